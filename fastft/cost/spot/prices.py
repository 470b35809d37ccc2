"""What GPU machines cost: SkyPilot's catalog, a CSV of one's own, or the two small catalogs that ship with fastft.

    offers = read_prices("v8")                          # or "2023", or paths: "~/.sky/catalogs/v8/aws/vms.csv,my.csv"
    best = cheapest(offers, "A100-80GB", 8, "aws", spot=True)

A CSV of one's own has the columns cloud, gpu, count, region, on_demand, spot: dollars a machine and hour; a price may be
empty; lines that begin with # are comments. A file of SkyPilot's is known by its columns (v5 to v8 have the same), its cloud
by its directory or the beginning of its name; GCP's bills host and GPUs in two rows, which are joined here.

Catalogs have errors, and an error is always the cheapest offer. An offer's price is doubted where

- on-demand is below spot, of the machine or of its GPUs alone: on-demand is doubted (seen: GCP A100-80GB, us-central1);
- on-demand is below 60 % of the same machine's in another region: list prices differ by a third at most (same rows);
- spot = on-demand, within 5 %: there is no discount, and hardly any spot capacity (seen: AWS p5.48xlarge, use1-az1);
- spot is below half the median of the cloud's spot prices for the machine: spot is doubted (seen: AWS p4d, use1-az1).

A doubted price is named and never chosen.
"""

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastft.cost.gpus import GPUS
from fastft.errors import UserError

SHIPPED = Path(__file__).with_name("price_lists")
CLOUDS = ("aws", "gcp", "azure", "lambda", "oci", "runpod", "nebius", "fluidstack", "cudo", "paperspace", "do", "ibm")

KINDS = {spelling: gpu.name for gpu in GPUS.values() for spelling in gpu.catalogs}
"""SkyPilot's names of GPUs -> those of fastft.cost.gpus. Others are left out."""

GCP_HOSTS = {"A100": "a2-highgpu-{}g", "A100-80GB": "a2-ultragpu-{}g", "H100": "a3-highgpu-{}g"}
"""The machine that so many GPUs are attached to; of those here, only GCP bills the two apart."""

LEAST_OF_REGIONS = 0.6
LEAST_OF_SPOTS = 0.5
DISCOUNT = 0.95


@dataclass(frozen=True)
class Offer:
    """A machine with GPUs at a place. Prices are dollars an hour of the whole machine; None: not offered."""

    cloud: str
    gpu: str
    """As in fastft.cost.gpus."""
    count: int
    region: str
    on_demand: float | None
    spot: float | None
    on_demand_doubt: str = ""
    """Why the price is not believed; empty: it is."""
    spot_doubt: str = ""

    def price(self, spot: bool) -> float | None:
        """Dollars an hour; None where it is not offered or not believed."""
        doubt, dollars = (self.spot_doubt, self.spot) if spot else (self.on_demand_doubt, self.on_demand)
        return None if doubt else dollars


def read_prices(names: str) -> list[Offer]:
    """The offers of shipped catalogs or files, separated by commas, with what is doubted about them.

    Raises UserError with one line for a file that is missing, of an unknown form, or without a GPU that fastft knows.
    """
    offers: list[Offer] = []
    for name in filter(None, (item.strip() for item in names.split(","))):
        path = SHIPPED / f"{name}.csv" if name in shipped() else Path(name).expanduser()
        offers += _read_file(path)
    if not offers:
        raise UserError(f"prices: {names!r} has no price of a GPU among {', '.join(dict.fromkeys(KINDS.values()))}")
    return doubt(offers)


def shipped() -> list[str]:
    """Names of the catalogs that come with fastft."""
    return sorted(path.stem for path in SHIPPED.glob("*.csv"))


def cheapest(offers: Iterable[Offer], gpu: str, count: int, cloud: str, spot: bool) -> Offer | None:
    """The cheapest of the cloud's believed offers of a machine with `count` of the GPU."""
    fitting = [o for o in offers if (o.gpu, o.count, o.cloud) == (gpu, count, cloud) and o.price(spot) is not None]
    return min(fitting, key=lambda offer: (offer.price(spot), offer.region), default=None)


def doubt(offers: Sequence[Offer]) -> list[Offer]:
    """The offers with every price that is not believed marked; see the top of the file for the rules."""
    groups: dict[tuple, list[Offer]] = {}
    for offer in offers:
        groups.setdefault((offer.cloud, offer.gpu, offer.count), []).append(offer)
    found = []
    for offer in offers:
        like = groups[offer.cloud, offer.gpu, offer.count]
        spots = statistics.median([o.spot for o in like if o.spot is not None] or [0.0])
        dearest = max((o.on_demand for o in like if o.on_demand is not None), default=0.0)
        on_demand, spot = offer.on_demand_doubt, offer.spot_doubt
        if offer.on_demand is not None and not on_demand:
            if offer.spot is not None and offer.on_demand < offer.spot:
                on_demand = f"on-demand ${offer.on_demand:.2f} is below spot ${offer.spot:.2f}"
            elif offer.on_demand < LEAST_OF_REGIONS * dearest:
                on_demand = f"on-demand ${offer.on_demand:.2f} beside ${dearest:.2f} in another region"
        if offer.spot is not None and not spot:
            if offer.on_demand is not None and DISCOUNT * offer.on_demand < offer.spot <= offer.on_demand:
                spot = f"spot ${offer.spot:.2f} = on-demand ${offer.on_demand:.2f}: no discount"
            elif offer.spot < LEAST_OF_SPOTS * spots:
                spot = f"spot ${offer.spot:.2f} is less than half the median, ${spots:.2f}"
        found.append(replace(offer, on_demand_doubt=on_demand, spot_doubt=spot))
    return found


# The files -----------------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> list[Offer]:
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(line for line in lines if not line.startswith("#"))
            rows = [{key: value or "" for key, value in row.items() if key} for row in reader]
            columns = set(reader.fieldnames or ())
    except FileNotFoundError:
        raise UserError(f"prices: {path}: no such file; {', '.join(shipped())} come with fastft") from None
    except OSError as error:
        raise UserError(f"prices: {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"prices: {path} is no CSV ({error})") from None
    if {"cloud", "gpu", "count", "region", "on_demand", "spot"} <= columns:
        return list(_own(rows, path))
    if {"AcceleratorName", "AcceleratorCount", "Region", "GpuPrice", "HostPrice"} <= columns:
        return list(_joined(rows, path))
    if {"InstanceType", "AcceleratorName", "AcceleratorCount", "Region", "Price", "SpotPrice"} <= columns:
        return list(_skypilot(rows, path))
    raise UserError(
        f"prices: {path} has columns {', '.join(sorted(columns)) or 'none'}; wanted are SkyPilot's of a vms.csv, or cloud, "
        "gpu, count, region, on_demand, spot"
    )


def _own(rows: list[dict], path: Path) -> Iterator[Offer]:
    for number, row in enumerate(rows, 1):
        gpu = KINDS.get(row["gpu"], row["gpu"])
        if gpu not in KINDS.values():
            raise UserError(f"prices: {path}, row {number}: no GPU {row['gpu']!r} is known")
        count = _number(row["count"], path, number)
        if not count or count != int(count):
            raise UserError(f"prices: {path}, row {number}: {row['count']!r} is no number of GPUs")
        on_demand, spot = (_number(row[key], path, number) for key in ("on_demand", "spot"))
        yield Offer(row["cloud"].strip().lower(), gpu, int(count), row["region"], on_demand, spot)


def _skypilot(rows: list[dict], path: Path) -> Iterator[Offer]:
    """A vms.csv. A GPU row without an instance type is GCP's: the machine it is attached to has a row of its own."""
    cloud = _cloud(path)
    zone = {id(row): (row["Region"], row.get("AvailabilityZone", "")) for row in rows}
    hosts = {(row["InstanceType"], *zone[id(row)]): row for row in rows if row["InstanceType"]}
    for number, row in _whole_gpus(rows, path):
        on_demand, spot = (_number(row[key], path, number) for key in ("Price", "SpotPrice"))
        offer = _offer(cloud, row, on_demand, spot)
        if not row["InstanceType"]:
            pattern = GCP_HOSTS.get(row["AcceleratorName"])
            host = hosts.get((pattern.format(offer.count), *zone[id(row)])) if pattern else None
            if host is None:  # a GPU that is rented by itself has no price of a machine
                continue
            prices = [_number(host[key], path, number) for key in ("Price", "SpotPrice")]
            offer = _with_host(offer, *prices)
        yield offer


def _joined(rows: list[dict], path: Path) -> Iterator[Offer]:
    """GCP's rows with host and GPUs side by side."""
    for number, row in _whole_gpus(rows, path):
        prices = [_number(row[key], path, number) for key in ("GpuPrice", "GpuSpotPrice", "HostPrice", "HostSpotPrice")]
        yield _with_host(_offer(_cloud(path), row, *prices[:2]), *prices[2:])


def _whole_gpus(rows: list[dict], path: Path) -> Iterator[tuple[int, dict]]:
    """(number, row) of those with a GPU that fastft knows; shares of one, which some clouds rent, are none."""
    for number, row in enumerate(rows, 1):
        if row["AcceleratorName"] in KINDS and (_number(row["AcceleratorCount"], path, number) or 0.5).is_integer():
            yield number, row


def _offer(cloud: str, row: dict, on_demand: float | None, spot: float | None) -> Offer:
    place = row.get("AvailabilityZone") or row["Region"]
    count = int(float(row["AcceleratorCount"]))
    return Offer(cloud, KINDS[row["AcceleratorName"]], count, place, on_demand, spot)


def _with_host(gpus: Offer, on_demand: float | None, spot: float | None) -> Offer:
    """The GPUs' offer and the host's as one. Doubted here, where the GPUs' own prices can still be seen."""
    doubted = doubt([gpus])[0].on_demand_doubt
    return replace(
        gpus,
        on_demand=None if gpus.on_demand is None or on_demand is None else gpus.on_demand + on_demand,
        spot=None if gpus.spot is None or spot is None else gpus.spot + spot,
        on_demand_doubt=f"of the GPUs alone, {doubted}" if doubted else "",
    )


def _cloud(path: Path) -> str:
    """…/aws/vms.csv, or aws_anything.csv."""
    for name in (path.parent.name, path.stem.split("_")[0]):
        if name.lower() in CLOUDS:
            return name.lower()
    raise UserError(f"prices: {path}: which cloud? Name the file aws_….csv, or put it into a directory of that name")


def _number(text: str, path: Path, row: int) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise UserError(f"prices: {path}, row {row}: {text!r} is no price or number")
    return value or None  # a price of 0 stands for none in SkyPilot's catalog

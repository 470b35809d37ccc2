"""Read prices of GPU machines from SkyPilot's catalog, a CSV of one's own, or the two small catalogs that ship with fastft.

    offers = read_prices("v8")                          # or "2023", or paths: "~/.sky/catalogs/v8/aws/vms.csv,my.csv"
    best = cheapest(offers, "A100-80GB", 8, "aws", spot=True)

A CSV of one's own has the columns cloud, gpu, count, region, on_demand, spot; the last two are dollars per machine and hour.
A price may be empty; lines that begin with # are comments. SkyPilot's files are recognised by their columns (v5 to v8 have
the same), and their cloud by the directory or the beginning of the file's name. GCP bills host and GPUs in two rows, which
are joined here.

Catalogs have errors, and an error is likely to be the cheapest offer. An on-demand price is doubted if

- it is below the spot price, for the machine or for its GPUs alone (seen: GCP A100-80GB, us-central1);
- it is below 60 % of the same machine's price in another region (seen in the same rows); list prices differ by a third at
  most.

A spot price is doubted if

- it is within 5 % of the on-demand price: without a discount there is hardly any spot capacity (seen: AWS p5.48xlarge,
  use1-az1);
- it is below half the median of the cloud's spot prices for the machine (seen: AWS p4d, use1-az1).

A doubted price is reported and never chosen. Some places can be used by an AWS account only after an opt-in
(`Offer.opt_in`): Local Zones, Wavelength Zones, and regions that are off by default. Their offers are reported, and chosen
only if the user asks for that, because most accounts are not opted in, and SkyPilot does not do it.
"""

import csv
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastft.cost.gpus import GPUS
from fastft.errors import UserError

SHIPPED = Path(__file__).with_name("price_lists")
CLOUDS = ("aws", "gcp", "azure", "lambda", "oci", "runpod", "nebius", "fluidstack", "cudo", "paperspace", "do", "ibm")

KINDS = {spelling: gpu.name for gpu in GPUS.values() for spelling in gpu.catalogs}
"""Maps SkyPilot's names of GPUs to those of fastft.cost.gpus. Rows with other GPUs are left out."""

GCP_HOSTS = {"A100": "a2-highgpu-{}g", "A100-80GB": "a2-ultragpu-{}g", "H100": "a3-highgpu-{}g"}
"""GCP's machine for a number of GPUs. It is the only cloud here that bills machine and GPUs separately."""

ON_BY_DEFAULT = (
    "us-east-1 us-east-2 us-west-1 us-west-2 ca-central-1 sa-east-1 eu-central-1 eu-west-1 eu-west-2 eu-west-3 eu-north-1 "
    "ap-south-1 ap-northeast-1 ap-northeast-2 ap-northeast-3 ap-southeast-1 ap-southeast-2"
).split()
"""AWS's regions that every account can use. An account has to turn on all others, those that are yet to come, too.

AWS's rule: regions that were announced after March 20, 2019 are off (docs.aws.amazon.com/accounts/latest/reference,
"Enable or disable AWS Regions in your account"); these 17 are on (docs.aws.amazon.com/awsconsolehelpdocs/latest/gsg,
"Supported Regions"). botocore 1.43.117 knows 17 more.
"""
# A region, us-east-1 or use1, and then its zone. Other names, such as those in a user's own list, say nothing.
_AWS_PLACE = re.compile(r"([a-z]{2}-(?:north|south|east|west|central)+-\d|[a-z]{2}(?:c|[ns][ew]?|[ew])\d)(.*)")
_ORDINARY_ZONE = re.compile(r"[a-z]?|-az\d+")  # us-east-1a, or its ID use1-az4

LEAST_OF_REGIONS = 0.6
LEAST_OF_SPOTS = 0.5
DISCOUNT = 0.95


@dataclass(frozen=True)
class Offer:
    """A machine with GPUs in a region. Prices are dollars per hour for the whole machine, None if it is not offered."""

    cloud: str
    gpu: str
    """The name of its GPUs in fastft.cost.gpus."""
    count: int
    region: str
    on_demand: float | None
    spot: float | None
    on_demand_doubt: str = ""
    """Why the on-demand price is not believed; empty if it is."""
    spot_doubt: str = ""
    """Why the spot price is not believed; empty if it is."""

    @property
    def opt_in(self) -> str:
        """What an AWS account has to turn on before it can rent this machine; empty if it need not turn on anything."""
        place = _AWS_PLACE.fullmatch(self.region) if self.cloud == "aws" else None
        if place is None:
            return ""
        region, zone = place.groups()
        if not _ORDINARY_ZONE.fullmatch(zone):  # us-east-1-atl-2a or use1-atl2-az1; us-east-1-wl1-bos-wlz-1
            return "a Wavelength Zone" if zone.startswith("-wl") else "a Local Zone"
        return "" if region in {*ON_BY_DEFAULT, *map(_short, ON_BY_DEFAULT)} else "a region"

    def price(self, spot: bool) -> float | None:
        """Dollars per hour; None if the machine is not offered in this way, or if the price is not believed."""
        doubt, dollars = (self.spot_doubt, self.spot) if spot else (self.on_demand_doubt, self.on_demand)
        return None if doubt else dollars


def _short(region: str) -> str:
    """The short form of a region with which the IDs of its zones begin: eus2 for eu-south-2, apse3 for ap-southeast-3."""
    area, direction, number = region.split("-")
    return area + re.sub("(north|south|east|west|central)", lambda word: word[0][0], direction) + number


def read_prices(names: str) -> list[Offer]:
    """Read the offers of catalogs that ship with fastft or of files, and mark their doubtful prices.

    `names` are separated by commas. Raises UserError for a file that is missing or of an unknown format, and if no offer has
    a GPU that fastft knows.
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
    """The cloud's cheapest offer of a machine with `count` of the GPU whose price is believed; None if there is none."""
    fitting = [o for o in offers if (o.gpu, o.count, o.cloud) == (gpu, count, cloud) and o.price(spot) is not None]
    return min(fitting, key=lambda offer: (offer.price(spot), offer.region), default=None)


def doubt(offers: Sequence[Offer]) -> list[Offer]:
    """Add the reason to every price that is not believed. The rules are in the module's docstring."""
    machines: dict[tuple, list[Offer]] = {}
    for offer in offers:
        machines.setdefault((offer.cloud, offer.gpu, offer.count), []).append(offer)
    found = []
    for offer in offers:
        same = machines[offer.cloud, offer.gpu, offer.count]
        on_demand = offer.on_demand_doubt or _on_demand_doubt(offer, same)
        found.append(replace(offer, on_demand_doubt=on_demand, spot_doubt=offer.spot_doubt or _spot_doubt(offer, same)))
    return found


def _on_demand_doubt(offer: Offer, same: Sequence[Offer]) -> str:
    """Say why the on-demand price is not believed, given all offers of the same machine; empty if it is believed."""
    if offer.on_demand is None:
        return ""
    if offer.spot is not None and offer.on_demand < offer.spot:
        return f"on-demand ${offer.on_demand:.2f} is below spot ${offer.spot:.2f}"
    dearest = max(o.on_demand for o in same if o.on_demand is not None)
    if offer.on_demand < LEAST_OF_REGIONS * dearest:
        return f"on-demand ${offer.on_demand:.2f} beside ${dearest:.2f} in another region"
    return ""


def _spot_doubt(offer: Offer, same: Sequence[Offer]) -> str:
    """Say why the spot price is not believed, given all offers of the same machine; empty if it is believed."""
    if offer.spot is None:
        return ""
    if offer.on_demand is not None and DISCOUNT * offer.on_demand < offer.spot <= offer.on_demand:
        return f"spot ${offer.spot:.2f} = on-demand ${offer.on_demand:.2f}: no discount"
    median = statistics.median(o.spot for o in same if o.spot is not None)
    if offer.spot < LEAST_OF_SPOTS * median:
        return f"spot ${offer.spot:.2f} is less than half the median, ${median:.2f}"
    return ""


# The files -----------------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> list[Offer]:
    """The offers of one file, whose format its columns tell. Raises UserError if it cannot be read."""
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
        f"prices: {path} has columns {', '.join(sorted(columns)) or 'none'}; expected those of SkyPilot's vms.csv, or cloud, "
        "gpu, count, region, on_demand, spot"
    )


def _own(rows: list[dict], path: Path) -> Iterator[Offer]:
    """The offers of a CSV of one's own."""
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
    """The offers of a vms.csv. A row without an instance type is GCP's and has the GPUs alone; their machine is another row."""
    cloud = _cloud(path)
    zone = {id(row): (row["Region"], row.get("AvailabilityZone", "")) for row in rows}
    hosts = {(row["InstanceType"], *zone[id(row)]): row for row in rows if row["InstanceType"]}
    for number, row in _whole_gpus(rows, path):
        on_demand, spot = (_number(row[key], path, number) for key in ("Price", "SpotPrice"))
        offer = _offer(cloud, row, on_demand, spot)
        if not row["InstanceType"]:
            pattern = GCP_HOSTS.get(row["AcceleratorName"])
            host = hosts.get((pattern.format(offer.count), *zone[id(row)])) if pattern else None
            if host is None:  # without its machine, the GPUs' price cannot be compared
                continue
            prices = [_number(host[key], path, number) for key in ("Price", "SpotPrice")]
            offer = _with_host(offer, *prices)
        yield offer


def _joined(rows: list[dict], path: Path) -> Iterator[Offer]:
    """The offers of a GCP file whose rows have the prices of both GPUs and host."""
    for number, row in _whole_gpus(rows, path):
        prices = [_number(row[key], path, number) for key in ("GpuPrice", "GpuSpotPrice", "HostPrice", "HostSpotPrice")]
        yield _with_host(_offer(_cloud(path), row, *prices[:2]), *prices[2:])


def _whole_gpus(rows: list[dict], path: Path) -> Iterator[tuple[int, dict]]:
    """(number, row) of each row with a whole number of GPUs that fastft knows; some clouds rent fractions of a GPU, too."""
    for number, row in enumerate(rows, 1):
        if row["AcceleratorName"] in KINDS and (_number(row["AcceleratorCount"], path, number) or 0.5).is_integer():
            yield number, row


def _offer(cloud: str, row: dict, on_demand: float | None, spot: float | None) -> Offer:
    place = row.get("AvailabilityZone") or row["Region"]
    count = int(float(row["AcceleratorCount"]))
    return Offer(cloud, KINDS[row["AcceleratorName"]], count, place, on_demand, spot)


def _with_host(gpus: Offer, on_demand: float | None, spot: float | None) -> Offer:
    """The offer of the GPUs and their host together. It is doubted if the prices of the GPUs alone would be."""
    doubted = doubt([gpus])[0].on_demand_doubt
    return replace(
        gpus,
        on_demand=None if gpus.on_demand is None or on_demand is None else gpus.on_demand + on_demand,
        spot=None if gpus.spot is None or spot is None else gpus.spot + spot,
        on_demand_doubt=f"of the GPUs alone, {doubted}" if doubted else "",
    )


def _cloud(path: Path) -> str:
    """The cloud that a file is named after, as in …/aws/vms.csv or aws_anything.csv."""
    for name in (path.parent.name, path.stem.split("_")[0]):
        if name.lower() in CLOUDS:
            return name.lower()
    raise UserError(
        f"prices: {path}: which cloud? Name the file aws_….csv, or put it into a directory named after the cloud"
    )


def _number(text: str, path: Path, row: int) -> float | None:
    """The number in a cell, None if it is empty or 0."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"prices: {path}, row {row}: {text!r} is no price or number")
    return value or None  # SkyPilot's catalog writes 0 if there is no price

"""Watch the cloud's metadata service for the notice that a spot machine is about to be taken away.

One thread on each machine asks the service, and ends if there is none. AWS gives two minutes of notice. It may send a
rebalance recommendation earlier, after which the run saves a checkpoint and continues. GCP and Azure give thirty seconds.

    AWS    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    GCP    https://cloud.google.com/compute/docs/instances/spot  (preempted?wait_for_change)
    Azure  https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from fastft.train.preemption.stop import NOTICE_S, StopFlag

logger = logging.getLogger(__name__)

POLL_S = 5.0  # as AWS advises
PROBE_S = 1.0
FIRST_ANSWER_S = 150.0  # for the first answer of Azure's scheduled events, which takes up to two minutes
AWS_NOTICE_S = 120.0
UNEXPECTED = (OSError, ValueError, KeyError, TypeError)  # no answer, or one that is not what the service documents
LINK_LOCAL = "http://169.254.169.254"
# Metadata services are never reached through a proxy.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def watch(stop_flag: StopFlag, poll_s: float = POLL_S) -> threading.Thread:
    """Start the thread that turns notices into `stop_flag.set`.

    The addresses are those of the clouds, unless AWS_EC2_METADATA_SERVICE_ENDPOINT, GCE_METADATA_HOST or
    AZURE_METADATA_ENDPOINT say otherwise.
    """
    thread = threading.Thread(target=_watch, args=(stop_flag, poll_s), name="notices", daemon=True)
    thread.start()
    return thread


def _watch(stop_flag: StopFlag, poll_s: float) -> None:
    """Find the cloud's service, and ask it until a stop is asked for."""
    for service in (Gcp, Aws, Azure):
        try:
            cloud = service()
        except UNEXPECTED:
            continue  # the machine is not in this cloud
        logger.info("notices: from the metadata service of %s", service.__name__.upper())
        while stop_flag.reason is None:
            try:
                cloud.ask(stop_flag, poll_s)
            except UNEXPECTED:  # the next answer may be readable again
                time.sleep(poll_s)
        return


class Aws:
    """AWS's IMDSv2. It serves a document, to requests with a token, which does not exist (404) until the notice."""

    def __init__(self) -> None:
        """Get a token. Raises OSError if there is no such service."""
        self.base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", LINK_LOCAL).rstrip("/") + "/latest"
        self._renew(PROBE_S)
        self.advised = False

    def ask(self, stop_flag: StopFlag, poll_s: float) -> None:
        """Set the flag if there is a notice; otherwise look for a recommendation, and wait for `poll_s`."""
        notice = self._document("spot/instance-action")
        if notice:
            action = json.loads(notice)
            stop_flag.set(f"AWS: spot {action['action']} at {action['time']}", self._seconds_until(action["time"]))
            return
        if not self.advised and self._document("events/recommendations/rebalance"):
            self.advised = stop_flag.save_soon = True
        time.sleep(poll_s)

    def _seconds_until(self, when: str) -> float:
        """Seconds until `when`, at most the length of a notice.

        They are counted from the service's time, because this machine's clock may be wrong.
        """
        then = datetime.fromisoformat(when.replace("Z", "+00:00"))
        return min(AWS_NOTICE_S, (then - self.now).total_seconds())

    def _renew(self, timeout: float) -> None:
        """Get a new token, which is valid for six hours."""
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        request = urllib.request.Request(f"{self.base}/api/token", method="PUT", headers=headers)
        with _open(request, timeout=timeout) as reply:
            self.token = reply.read().decode()

    def _document(self, name: str) -> str | None:
        """The document, or None if it does not exist, or if the token had to be renewed first."""
        request = urllib.request.Request(
            f"{self.base}/meta-data/{name}", headers={"X-aws-ec2-metadata-token": self.token}
        )
        try:
            with _open(request, timeout=5) as reply:
                self.now = parsedate_to_datetime(reply.headers["Date"])
                return reply.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 401:  # the token has expired
                self._renew(5)
            elif error.code != 404:
                raise
        return None


class Gcp:
    """GCP's value that becomes TRUE at the notice. A request waits until the value changes."""

    def __init__(self) -> None:
        """Read the value once. Raises OSError if there is no such service."""
        host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
        self.url = f"http://{host}/computeMetadata/v1/instance/preempted"
        self._read("alt=text", PROBE_S)

    def ask(self, stop_flag: StopFlag, poll_s: float) -> None:
        """Set the flag if the value is TRUE; otherwise wait until it changes, for twelve `poll_s` at most."""
        wait = max(1, int(poll_s * 12))
        if self.value == "TRUE":
            stop_flag.set("GCP: the instance is being preempted", NOTICE_S)
        else:  # last_etag names the value that was read last, so no change between two requests is missed
            self._read(f"wait_for_change=true&timeout_sec={wait}&last_etag={self.tag}", wait + 5)

    def _read(self, query: str, timeout: float) -> None:
        request = urllib.request.Request(f"{self.url}?{query}", headers={"Metadata-Flavor": "Google"})
        with _open(request, timeout=timeout) as reply:
            self.tag = reply.headers.get("ETag", "0")
            self.value = reply.read().decode().strip()


class Azure:
    """Azure's scheduled events, which name the events of all machines of a group; a preemption is the event Preempt.

    The first request for events starts their service, and is answered after up to two minutes. The description of the
    instance is answered at once, so it is used to find out whether this is Azure.
    """

    def __init__(self) -> None:
        """Read the description of the instance. Raises OSError if there is no such service."""
        self.base = os.environ.get("AZURE_METADATA_ENDPOINT", LINK_LOCAL).rstrip("/") + "/metadata"
        self.name = self._read("instance?api-version=2021-02-01", PROBE_S)["compute"]["name"].lower()
        self.timeout = FIRST_ANSWER_S

    def ask(self, stop_flag: StopFlag, poll_s: float) -> None:
        """Set the flag if this machine is being preempted; otherwise wait for `poll_s`, but no longer than a second."""
        events = self._read("scheduledevents?api-version=2020-07-01", self.timeout)["Events"]
        self.timeout = 5.0
        for event in events:
            if event["EventType"] == "Preempt" and self.name in map(str.lower, event["Resources"]):
                stop_flag.set("Azure: the machine is being preempted", self._seconds(event.get("NotBefore", "")))
                return
        time.sleep(min(poll_s, 1.0))  # the notice is thirty seconds long

    def _seconds(self, not_before: str) -> float:
        """Seconds until the preemption. An empty NotBefore says that it has begun."""
        if not not_before:
            return NOTICE_S
        then = parsedate_to_datetime(not_before)
        then = then if then.tzinfo else then.replace(tzinfo=timezone.utc)
        return min(NOTICE_S, (then - self.now).total_seconds())

    def _read(self, document: str, timeout: float) -> dict:
        request = urllib.request.Request(f"{self.base}/{document}", headers={"Metadata": "true"})
        with _open(request, timeout=timeout) as reply:
            self.now = parsedate_to_datetime(reply.headers["Date"])
            return json.loads(reply.read())

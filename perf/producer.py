"""Push against any server that speaks the contract, and tell what came of it.

python -m perf.producer --url http://127.0.0.1:6632 --queue q --batch 1000 --connections 50 --seconds 5
"""

from __future__ import annotations

import argparse
import sys
import time

import trio

from perf import load
from perf.bodies import Ids, PushBodies


async def main() -> int:
    parser = argparse.ArgumentParser(prog="perf.producer", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:6632")
    parser.add_argument("--queue", default="bench")
    parser.add_argument("--batch", type=int, default=1000, help="messages of a request")
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--partitions", type=int, default=1, help="requests go round this many")
    parser.add_argument("--spread", action="store_true", help="the messages of each request go round the partitions")
    parser.add_argument("--ids", type=Ids, choices=list(Ids), default=Ids.NONE, help="transactionIds; none: minted")
    parser.add_argument("--payload-bytes", type=int, default=32)
    parser.add_argument("--per-second", type=float, help="requests a second at intended times: an open loop")
    arguments = parser.parse_args()
    bodies = PushBodies(
        arguments.url,
        arguments.queue,
        batch=arguments.batch,
        partitions=arguments.partitions,
        spread=arguments.spread,
        ids=arguments.ids,
        payload_bytes=arguments.payload_bytes,
    )
    began = time.process_time()
    outcome = await load.push(
        arguments.url,
        bodies,
        batch=arguments.batch,
        connections=arguments.connections,
        seconds=arguments.seconds,
        pacer=load.Pacer(arguments.per_second) if arguments.per_second else None,
    )
    return load.tell(outcome, "pushed", time.process_time() - began)


if __name__ == "__main__":
    sys.exit(trio.run(main))

"""Pop from any server that speaks the contract, and tell what came. Without --auto-ack every batch is acked.

python -m perf.consumer --url http://127.0.0.1:6632 --queue q --batch 1000 --connections 50 --seconds 5 --auto-ack
"""

from __future__ import annotations

import argparse
import sys
import time

import trio

from perf import load


async def main() -> int:
    parser = argparse.ArgumentParser(prog="perf.consumer", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:6632")
    parser.add_argument("--queue", default="bench")
    parser.add_argument("--batch", type=int, default=1000, help="messages of a pop, at most")
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--messages", type=int, help="stop after this many")
    parser.add_argument("--partitions", type=int, default=1, help="how many one pop may claim; acks need 1")
    parser.add_argument("--auto-ack", action="store_true")
    parser.add_argument("--wait", action="store_true", help="long polls of a second")
    parser.add_argument("--group", help="consumer group; none: queue mode")
    parser.add_argument("--per-second", type=float, help="requests a second at intended times: an open loop")
    arguments = parser.parse_args()
    if arguments.partitions > 1 and not arguments.auto_ack:
        parser.error("--partitions above 1 needs --auto-ack: acks here are of one partition")
    began = time.process_time()
    outcome = await load.pop(
        arguments.url,
        arguments.queue,
        batch=arguments.batch,
        connections=arguments.connections,
        seconds=arguments.seconds,
        expected=arguments.messages,
        auto_ack=arguments.auto_ack,
        wait=arguments.wait,
        partitions=arguments.partitions,
        group=arguments.group,
        pacer=load.Pacer(arguments.per_second) if arguments.per_second else None,
    )
    return load.tell(outcome, "popped" if arguments.auto_ack else "popped and acked", time.process_time() - began)


if __name__ == "__main__":
    sys.exit(trio.run(main))

"""A program of a cluster, such as `srun`: what it is called with goes to tests/deploy/cluster.py.

    stub.py SOCKET PROGRAM ARGUMENTS    # prints what is answered, and ends with the code in it

Signals are told to the other side, which knows what the program does of them.
"""

import json
import os
import signal
import socket
import sys

connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])


def send(**message: object) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


send(program=sys.argv[2], args=sys.argv[3:], env=dict(os.environ))
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: send(signal=number))
answer = json.loads(connection.makefile().readline() or '{"out": "", "code": 1}')
sys.stdout.write(answer["out"])
sys.exit(answer["code"])

"""The command ``dlrm`` without the seconds that importing PyTorch takes each time.

``python warm_dlrm.py serve SOCKET`` imports everything once, then runs each command in a fork of
its own, with the caller's folder, input and output. ``python warm_dlrm.py call SOCKET …`` is that
caller, which passes signals on and ends with the command's status.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import traceback


def serve(path: str) -> None:
    for name in ("data.synthetic", "pipeline", "reference.runner", "serve.supervisor"):
        importlib.import_module(f"dlrm.{name}")
    # And what is imported when it is first needed: for raw rows pyarrow imports pandas.
    for name in ("docstring_parser", "pandas", "pyarrow.pandas_compat", "tyro"):
        importlib.import_module(name)
    from dlrm.cli import main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen()
        os.rename(f"{path}.new", path)  # who sees it can connect
        while True:
            caller, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                message, files, _, _ = socket.recv_fds(caller, 1 << 16, 3)
                folder, *arguments = json.loads(message)
                for standard, file in enumerate(files):
                    os.dup2(file, standard)
                os.chdir(folder)
                caller.send(os.getpid().to_bytes(4, "little"))
                status = 1
                try:
                    main(arguments)
                except SystemExit as end:
                    status = int(end.code or 0)
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                caller.send(bytes([status]))
                os._exit(0)
            caller.close()


def call(path: str, arguments: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        message = json.dumps([os.getcwd(), *arguments]).encode()
        socket.send_fds(server, [message], [0, 1, 2])
        process = int.from_bytes(server.recv(4), "little")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: os.kill(process, number))
        return (server.recv(1) or b"\1")[0]


if __name__ == "__main__":
    role, place, *rest = sys.argv[1:]
    if role == "serve":
        serve(place)
    sys.exit(call(place, rest))

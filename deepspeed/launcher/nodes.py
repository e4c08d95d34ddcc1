"""Runs the commands that stand for the hosts of a job, and sees to their end: the node that failed first is named."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any

from ..errors import ConfigError
from .backends import NodeCommand
from .supervise import ANNOUNCEMENT, Ladder, SignalInbox, describe_end, exit_code, logger, tied_to_parent

__all__ = ["NodeSupervisor", "Relay"]

_SSH_FAILED = 255  # ssh(1): its own errors; a remote command's code is passed on
#: What pdsh says of a host that is done and did not succeed; it goes on with the others, so this must be heard.
_PDSH = re.compile(rb"pdsh@\S+: (\S+): (\S+) (?:exited with exit code|killed by signal) (\d+)\s*")


class Relay:
    """Passes output on line by line, each begun with a prefix; keeps announcements for itself.

    A line also ends at a carriage return, so that progress bars move.
    """

    def __init__(self, target: IO[bytes], prefix: str) -> None:
        self._target = target
        self._prefix = prefix.encode()
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Takes what was read (nothing: the end); returns the announcements in it."""
        whole = self._rest + data
        end = max(whole.rfind(b"\n"), whole.rfind(b"\r")) + 1 if data else len(whole)
        whole, self._rest = whole[:end], whole[end:]
        news, out = [], []
        for line in whole.splitlines(keepends=True):
            label, mark, text = line.partition(ANNOUNCEMENT.encode())
            if mark:
                with contextlib.suppress(ValueError):
                    news.append({"host": label.decode(errors="replace").strip(" :"), **json.loads(text)})
                    continue
            if (said := _PDSH.fullmatch(line)) is not None:
                news.append(_of_pdsh(said))
            out.append(self._prefix + line)
        if out:
            self._target.write(b"".join(out))
            self._target.flush()
        return news


def _of_pdsh(said: re.Match[bytes]) -> dict[str, Any]:
    host, program, number = (group.decode(errors="replace") for group in said.groups())
    returned = -int(number) if b"killed by" in said[0] else int(number)
    lost = returned < 0 or returned == _SSH_FAILED
    who = f"lost or never reached: {program}" if lost else program
    return {"host": host, "who": who, "code": exit_code(returned), "how": describe_end(returned)}


class _Node:
    def __init__(self, command: NodeCommand) -> None:
        self.command = command
        self.announced = False
        piped = subprocess.PIPE if command.prefix is not None else None
        try:
            self.process = subprocess.Popen(
                command.argv,
                env={**os.environ, **command.environment},
                stdin=subprocess.PIPE if command.leashed else subprocess.DEVNULL,
                stdout=piped,
                stderr=piped,
                start_new_session=True,  # a terminal's Ctrl-C is for this process alone, which passes it on
                preexec_fn=tied_to_parent(number=signal.SIGTERM),
            )
        except OSError as error:
            raise ConfigError(f"{command.label} cannot be reached: {command.argv[0]}: {error}") from error

    def send(self, number: signal.Signals) -> None:
        if self.command.leashed and self.process.stdin is not None and number != signal.SIGKILL:
            with contextlib.suppress(OSError):
                os.write(self.process.stdin.fileno(), f"{number.name}\n".encode())
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def let_go(self) -> None:
        """Ends the local process, if it runs, and with it the leash."""
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class NodeSupervisor:
    """Runs commands to their end. Use :meth:`run` once, in the main thread.

    Args:
        commands: what to run.
        minimum_nodes: the number of nodes that can go on without the others; ``None``: a node's failure ends all.
    """

    def __init__(self, commands: Sequence[NodeCommand], minimum_nodes: int | None = None) -> None:
        self._commands = commands
        self._minimum = minimum_nodes
        self._ladder = Ladder()
        self._running: list[_Node] = []
        self._selector = selectors.DefaultSelector()
        self._code = 0
        self._nodes_left = sum(command.nodes for command in commands)
        self._failed_hosts: set[str] = set()
        self._someone_succeeded = False
        #: Label -> exit code of the commands that failed by themselves.
        self.failures: dict[str, int] = {}

    def run(self) -> int:
        """Returns the job's exit code: 0, or that of the first failure; 128 + number after a signal from the user.

        With ``minimum_nodes``, nodes that were lost do not count if others ended well.

        Raises:
            ConfigError: a command cannot be started; none is left running then.
        """
        nodes: list[_Node] = []
        with SignalInbox() as inbox, self._selector:
            self._selector.register(inbox, selectors.EVENT_READ)
            try:
                for command in self._commands:
                    nodes.append(_Node(command))
                    self._listen(nodes[-1])
                self._running = list(nodes)
                while self._running:
                    self._turn(inbox)
            finally:
                for node in nodes:
                    node.let_go()
        return 0 if self._someone_succeeded and self._ladder.cause is None else self._code

    def _turn(self, inbox: SignalInbox) -> None:
        for key, _ in self._selector.select(self._ladder.seconds_to_next_rung()):
            if key.data is not None:
                self._read(*key.data)
        for name in inbox.take():
            self._on_signal(name)
        self._reap()
        while self._running and self._ladder.seconds_to_next_rung() == 0:
            self._climb()

    def _listen(self, node: _Node) -> None:
        pairs = ((node.process.stdout, sys.stdout), (node.process.stderr, sys.stderr))
        for stream, target in pairs:
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                relay = Relay(target.buffer, node.command.prefix or "")
                self._selector.register(stream, selectors.EVENT_READ, (node, stream, relay))

    def _read(self, node: _Node, stream: IO[bytes], relay: Relay) -> None:
        try:
            data = os.read(stream.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._selector.unregister(stream)
        for news in relay.feed(data):
            self._on_news(node, news)

    def _on_news(self, node: _Node, news: dict[str, Any]) -> None:
        node.announced = True
        host = news["host"] or node.command.label.removeprefix("node ")
        if host in self._failed_hosts:
            return  # pdsh reports the end of a node that announced its reason before
        self._failed_hosts.add(host)
        self._nodes_left -= 1
        self._on_failure(node, f"node {host}: {news['who']} {news['how']}", int(news["code"]))

    def _reap(self) -> None:
        for node in list(self._running):
            returned = node.process.poll()
            if returned is None:
                continue
            self._drain(node)
            self._running.remove(node)
            code = exit_code(returned)
            self._nodes_left -= 0 if node.announced else node.command.nodes
            if code == 0:
                self._someone_succeeded = True
            elif self._ladder.cause in signal.Signals.__members__:
                self._code = 128 + signal.Signals[str(self._ladder.cause)]
            elif not node.announced:
                self._on_failure(node, f"{node.command.label} {self._describe(node, returned)}", code)

    def _drain(self, node: _Node) -> None:
        """What the node said last; not more, since a process that it left behind may hold the pipe open for long."""
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data[0] is node:
                self._read(*key.data)
                if key.fileobj in self._selector.get_map():
                    self._selector.unregister(key.fileobj)
                    key.data[2].feed(b"")

    def _describe(self, node: _Node, returned: int) -> str:
        if not node.command.leashed:
            return describe_end(returned)
        if returned == _SSH_FAILED:
            return f"was lost or never reached ({node.command.argv[0]} {describe_end(returned)})"
        if returned < 0:
            return f"was lost ({node.command.argv[0]} {describe_end(returned)})"
        return describe_end(returned)

    def _on_failure(self, node: _Node, what: str, code: int) -> None:
        if self._ladder.cause is not None:
            if not self._ladder.sent:  # later it would be our doing
                logger.error(f"{what}, too")
            return
        self.failures.setdefault(node.command.label, code)
        self._code = self._code or code
        if self._minimum is not None and self._nodes_left >= self._minimum:
            logger.error(f"{what}; {self._nodes_left} node(s) go on" if self._nodes_left else what)
            return
        names = ", ".join(other.command.label for other in self._running if other is not node)
        logger.error(f"{what}; stopping {names}" if names else what)
        self._ladder.begin("killed" if code > 128 else "failure")

    def _on_signal(self, name: str) -> None:
        if self._ladder.cause is None:
            logger.warning(f"got {name}; passing it on to {len(self._running)} node(s)")
            self._ladder.begin(name)
        else:
            logger.warning(f"got {name} while the nodes are ending; not waiting any longer")
            self._climb()

    def _climb(self) -> None:
        step = self._ladder.climb()
        if step is None:
            return
        number, had_time = step
        if had_time:
            late = ", ".join(node.command.label for node in self._running)
            logger.warning(f"{late} did not end; sending {number.name}")
        for node in self._running:
            node.send(number)

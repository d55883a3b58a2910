"""What passes between the judge and a learner's process: values, tensors and calls, no pickles.

The judge runs the checks; the learner's code runs in another process, and the judge believes
nothing that comes from there. So a message is JSON and the plain bytes of tensors. Reading one
runs no code: numbers, texts, containers and tensors are rebuilt, records and other dataclasses of
this package are filled in without calling them, and anything else stays where it is and is known
here by a number. A `Far` object stands for it: to call it is to call over the wire.

What the judge hands out comes back changed if the learner's code changed it: lists, dictionaries,
objects, and every byte of a tensor's storage, so that a view or a kernel's stray write shows.
"""

import builtins
import json
import os
import select
import struct
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import is_dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from llmopt_lab.core import errors
from llmopt_lab.core.trace import Record
from llmopt_lab.grading.checks import NotYet, learners_frame

MAX_TEXT = 16 << 20  # bytes of JSON in a message
MAX_BYTES = 256 << 20  # of tensors in a message, and of one tensor spread out
MAX_ITEMS = 1_000_000  # of a container
MAX_DEPTH = 60  # of containers in containers, and of calls in calls
HEADER = struct.Struct(">II")
DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if type(d) is torch.dtype}
PLAIN = (type(None), bool, int, float, str)
CONTAINERS = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque"}
MAPPINGS = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter"}
SIMPLE = (int, float, str, list, tuple, set, frozenset)
OURS = "llmopt_lab."
STAND_INS = (".cases", ".chance")  # models in name only, dice: they stay where they count


class Stopped(BaseException):
    """The learner's process is gone. `why` is "died", "timeout", "memory", "processes", "garbage".

    No Exception: a check that catches those must not take it for the learner's own.
    """

    def __init__(self, why: str, message: str):
        super().__init__(message)
        self.why = why


class Garbled(errors.LabError, ValueError):
    """A message that is not one of ours, or a value too large or too deep to be sent."""


class Channel:
    """Messages over two file descriptors, with a deadline for each. Reads no more than the limits.

    `watch` is called about four times a second while waiting; it may raise.
    """

    def __init__(self, read_fd: int, write_fd: int, watch: Callable[[], None] = lambda: None):
        self.read_fd, self.write_fd, self.watch = read_fd, write_fd, watch
        self.deadline = float("inf")
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    def send(self, text: bytes, blob: bytes) -> None:
        data = memoryview(HEADER.pack(len(text), len(blob)) + text + blob)
        while data:
            self._wait(self.write_fd, select.POLLOUT)
            try:
                data = data[os.write(self.write_fd, data[: 1 << 20]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise EOFError from error

    def receive(self) -> tuple[bytes, bytes]:
        n_text, n_blob = HEADER.unpack(self._read(HEADER.size))
        if n_text > MAX_TEXT or n_blob > MAX_BYTES:
            raise Garbled(f"a message of {n_text + n_blob:,} bytes")
        return self._read(n_text), self._read(n_blob)

    def _read(self, n: int) -> bytes:
        parts, missing = [], n
        while missing:
            self._wait(self.read_fd, select.POLLIN)
            try:
                part = os.read(self.read_fd, min(missing, 1 << 20))
            except BlockingIOError:
                continue
            except OSError as error:
                raise EOFError from error
            if not part:
                raise EOFError
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _wait(self, fd: int, event: int) -> None:
        poll = select.poll()
        poll.register(fd, event)
        while not poll.poll(max(0.0, min(0.25, self.deadline - time.monotonic())) * 1000):
            if time.monotonic() >= self.deadline:
                raise TimeoutError
            self.watch()


class Far:
    """Something that lives in the other process. Calls and attributes go there."""

    def __init__(self, peer, handle: int):
        self.__dict__.update(_peer=peer, _handle=handle)

    def __call__(self, *args, **kwargs):
        return self._peer.call(self._handle, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return self._peer.get(self._handle, name)

    def __setattr__(self, name: str, value):
        raise AttributeError(f"{name} belongs to the checks and cannot be changed")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class FarKernel(Far):
    """A Triton kernel in the other process; `text` is its source there."""

    def __init__(self, peer, handle: int, text: str):
        super().__init__(peer, handle)
        self.__dict__["text"] = text

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self._peer.call(self._handle, args, kwargs, grid=grid)


def far(peer, content: dict) -> Far:
    """A stand-in whose type has the name of what it stands for, as messages quote it."""
    kind = FarKernel if "kernel" in content else Far
    name = str(content.get("type", ""))[:60]
    arguments = (str(content["kernel"]),) if "kernel" in content else ()
    return type(name if name.isidentifier() else "object", (kind,), {})(
        peer, int(content["far"]), *arguments
    )


class Codec:
    """One side's end: turns values into messages and back.

    `lends` is the judge's: what it sends may come back changed. The other side gives back.
    """

    def __init__(self, peer, lends: bool):
        self.peer, self.lends = peer, lends
        self.given: dict[int, object] = {}  # what the other side knows by number
        self.leaves_out: list[Tensor] | None = None  # tensors with gradients in our open call
        self.leaves_in: list[Tensor] = []  # and in the one that we serve
        self.calling = False  # while the arguments of a call are encoded
        self.start_call()

    def start_call(self) -> None:
        """Forget what was lent; call it before each call that the judge starts."""
        self.lent: dict[int, object] = {}
        self.number_of: dict[int, int] = {}  # id of what was lent or borrowed -> its number
        self.storages: dict[int, object] = {}
        self.before: dict[int, bytes] = {}  # of a borrowed storage

    # out

    def encode(self, value, blobs: list[bytes], depth: int = 0):
        """`value` as JSON; bytes of tensors are appended to `blobs`."""
        if depth > MAX_DEPTH:
            raise Garbled("a value with too many levels")
        kind = type(value)
        if kind in PLAIN:
            return value
        if (number := self.number_of.get(id(value))) is not None:
            return {"lent": number}
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return {"scalar": str(value.dtype), "value": value.item()}
        if hasattr(kind, "_fields") and kind.__module__.startswith(OURS):  # a NamedTuple
            parts = [self.encode(x, blobs, depth + 1) for x in value]
            return {"of": _name_of(kind), "parts": parts}
        if not self.lends and isinstance(value, SIMPLE) and kind is not torch.Size:
            value = _without_subclass(value)
            kind = type(value)
            if kind in PLAIN:
                return value
        if kind in (Tensor, torch.nn.Parameter) and value.layout == torch.strided:
            return self._encode_tensor(value, blobs)
        if kind in CONTAINERS or kind in MAPPINGS or self._goes_by_value(value):
            number = self._lend(value) if self.lends and kind not in (tuple, frozenset) else None
            return {**self.content(value, blobs, depth), "n": number}
        if kind is np.ndarray and value.dtype.kind in "biuf":
            blobs.append(value.tobytes())
            return {"array": str(value.dtype), "shape": value.shape, "blob": len(blobs) - 1}
        if kind is slice:
            return {"slice": [self.encode(x, blobs, depth + 1) for x in
                              (value.start, value.stop, value.step)]}  # fmt: skip
        if kind is range:
            return {"range": [value.start, value.stop, value.step]}
        if kind is torch.Size:
            return {"size": list(value)}
        if kind is Fraction:
            return {"fraction": [value.numerator, value.denominator]}
        if kind is complex:
            return {"complex": [value.real, value.imag]}
        if kind is torch.dtype:
            return {"dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"device": str(value)}
        if value is ...:
            return {"ellipsis": True}
        if isinstance(value, Far) and value._peer is self.peer:
            return {"yours": value._handle}
        return self._give(value)

    def content(self, value, blobs: list[bytes], depth: int = 0) -> dict:
        """What is in a container or an object."""
        kind = type(value)
        if kind in CONTAINERS and len(value) > MAX_ITEMS:
            raise Garbled(f"a {kind.__name__} of {len(value):,} items is too long to be sent")
        if kind in CONTAINERS:
            items = [self.encode(x, blobs, depth + 1) for x in value]
            return {"items": items, "as": CONTAINERS[kind]}
        if kind in MAPPINGS or isinstance(value, dict):
            pairs = [[self.encode(k, blobs, depth + 1), self.encode(v, blobs, depth + 1)]
                     for k, v in value.items()]  # fmt: skip
            return {"pairs": pairs, "as": MAPPINGS.get(kind, "dict")}
        fields = {k: self.encode(v, blobs, depth + 1) for k, v in vars(value).items()}
        return {"fields": fields, "of": _name_of(kind)}

    def _goes_by_value(self, value) -> bool:
        kind = type(value)
        if isinstance(value, type) or not hasattr(value, "__dict__"):
            return isinstance(value, dict) and not self.lends
        if isinstance(value, Record):
            return is_dataclass(kind)
        ours = [c.__module__ for c in kind.__mro__ if c.__module__.startswith(OURS)]
        rooms = [m for m in ours if not m.startswith(f"{OURS}grading")]
        if not rooms or rooms[0].endswith(STAND_INS) or isinstance(value, BaseException):
            return False
        return kind.__module__.startswith(OURS) and not isinstance(value, torch.nn.Module)

    def _encode_tensor(self, value: Tensor, blobs: list[bytes]) -> dict:
        needs_grad, device = value.requires_grad, value.device.type
        plain = value.detach().resolve_conj().resolve_neg()
        key = plain.untyped_storage()._cdata
        number, blob = self.number_of.get(key), None
        if number is None:
            if self.lends:
                number = self._lend(plain.untyped_storage(), key)
                raw = plain.untyped_storage()
            else:
                plain = plain.contiguous().clone()
                raw = plain.untyped_storage()
            blobs.append(_bytes_of(raw))
            blob = len(blobs) - 1
        content = {
            "tensor": str(value.dtype).removeprefix("torch."), "shape": list(plain.shape),
            "stride": list(plain.stride()), "at": plain.storage_offset(), "storage": number,
            "blob": blob, "device": device,
        }  # fmt: skip
        if needs_grad and self.calling:
            self.leaves_out.append(value)
            content["leaf"] = True
        elif needs_grad:
            content["grad"] = self._number((value, list(self.leaves_in)))
        return content

    def _lend(self, value, key: int | None = None) -> int:
        number = len(self.lent)
        self.lent[number] = value
        self.number_of[id(value) if key is None else key] = number
        return number

    def _number(self, value) -> int:
        self.given[len(self.given)] = value
        return len(self.given) - 1

    def _give(self, value) -> dict:
        if self.lends and isinstance(value, (type(os), type)):
            raise Garbled(f"{value!r} is not for the learner's process")
        content = {"far": self._number(value), "type": type(value).__name__}
        if not self.lends and (text := _kernel_text(value)):
            content["kernel"] = text
        return content

    def give_back(self, blobs: list[bytes]) -> list:
        """[number, what is in it now] of all that was borrowed; storages only if they changed."""
        back = []
        for number, value in list(self.lent.items()):
            if isinstance(value, torch.UntypedStorage):
                now = _bytes_of(value)
                if now != self.before[number]:
                    blobs.append(now)
                    self.before[number] = now
                    back.append([number, {"blob": len(blobs) - 1}])
            else:
                back.append([number, self.content(value, blobs)])
        return back

    def take_back(self, back: list, blobs: list[bytes]) -> None:
        """What was lent becomes what the other side made of it."""
        for number, content in back:
            value = self.lent[number]
            if isinstance(value, torch.UntypedStorage):
                raw = blobs[content["blob"]]
                if len(raw) != value.nbytes():
                    raise Garbled("a tensor came back in another size")
                _as_bytes(value).copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
            elif isinstance(value, (list, deque)):
                items = [self.decode(x, blobs) for x in content["items"]]
                value.clear()
                value.extend(items)
            elif isinstance(value, (dict, set)):
                new = self._container(content, blobs, 0)
                value.clear()
                value.update(new)
            else:
                fields = {k: self.decode(v, blobs) for k, v in content["fields"].items()}
                vars(value).clear()
                vars(value).update(fields)

    # in

    def decode(self, tree, blobs: list[bytes], depth: int = 0):
        """The value that `encode` was given on the other side."""
        if depth > MAX_DEPTH:
            raise Garbled("a value with too many levels")
        if type(tree) in PLAIN:
            return tree
        if type(tree) is not dict:
            raise Garbled(f"{tree!r:.60} is no value")
        match tree:
            case {"lent": number}:
                return self.lent[number]
            case {"tensor": _}:
                return self._decode_tensor(tree, blobs)
            case {"items": _} | {"pairs": _}:
                return self._remember(self._container(tree, blobs, depth), tree)
            case {"fields": fields, "of": name}:
                value = object.__new__(self._class(name))
                self._remember(value, tree)
                vars(value).update({k: self.decode(v, blobs, depth + 1) for k, v in fields.items()})
                return value
            case {"parts": parts, "of": name}:
                return self._class(name)(*(self.decode(x, blobs, depth + 1) for x in parts))
            case {"scalar": name, "value": value}:
                return np.dtype(name).type(value)
            case {"array": name, "shape": shape, "blob": blob}:
                return np.frombuffer(blobs[blob], np.dtype(name)).reshape(shape).copy()
            case {"slice": parts}:
                return slice(*(self.decode(x, blobs, depth + 1) for x in parts))
            case {"range": parts}:
                if len(value := range(*parts)) > MAX_ITEMS:
                    raise Garbled(f"{value} is too long")
                return value
            case {"size": parts}:
                return torch.Size(parts)
            case {"fraction": [n, d]}:
                return Fraction(n, d)
            case {"complex": [real, imag]}:
                return complex(real, imag)
            case {"dtype": name}:
                return DTYPES[name]
            case {"device": name}:
                return torch.device(name)
            case {"ellipsis": True}:
                return ...
            case {"yours": handle}:
                return self.given[handle]
            case {"far": int()}:
                return far(self.peer, tree)
        raise Garbled(f"{tree!r:.60} is no value")

    def _container(self, tree: dict, blobs: list[bytes], depth: int):
        if "items" in tree:
            kind = {name: kind for kind, name in CONTAINERS.items()}[tree["as"]]
            return kind([self.decode(x, blobs, depth + 1) for x in tree["items"]])
        kind = {name: kind for kind, name in MAPPINGS.items()}[tree["as"]]
        pairs = [(self.decode(k, blobs, depth + 1), self.decode(v, blobs, depth + 1))
                 for k, v in tree["pairs"]]  # fmt: skip
        return kind(pairs) if kind is not Counter else Counter(dict(pairs))

    def _remember(self, value, tree: dict):
        """On the side that borrows: what comes with a number goes back with it."""
        if not self.lends and tree.get("n") is not None:
            self.lent[tree["n"]] = value
            self.number_of[id(value)] = tree["n"]
        return value

    def _decode_tensor(self, tree: dict, blobs: list[bytes]) -> Tensor:
        dtype = DTYPES[tree["tensor"]]
        n = 1
        for size in tree["shape"]:
            n *= size
        if n * dtype.itemsize > MAX_BYTES:
            raise Garbled(f"a tensor of shape {tree['shape']}")
        number = tree["storage"]
        if tree["blob"] is not None:
            raw = blobs[tree["blob"]]
            storage = torch.frombuffer(bytearray(raw), dtype=torch.uint8).untyped_storage() \
                if raw else torch.UntypedStorage(0)  # fmt: skip
            if not self.lends:
                if tree.get("device", "cpu") != "cpu":
                    storage = torch.empty(0, dtype=torch.uint8).set_(storage)
                    storage = storage.to(tree["device"]).untyped_storage()
                self.lent[number] = storage
                self.number_of[storage._cdata] = number
                self.before[number] = raw
        else:
            storage = self.lent[number]
        value = torch.empty(0, dtype=dtype, device=storage.device)
        value = value.set_(storage, tree["at"], tuple(tree["shape"]), tuple(tree["stride"]))
        if self.lends and storage.device.type == "cpu" and tree.get("device") == "cuda":
            value = value.to("cuda")
        if "leaf" in tree:
            value.requires_grad_()
            self.leaves_in.append(value)
        if "grad" in tree:
            return _Graft.apply(self.peer, int(tree["grad"]), value, *(self.leaves_out or ()))
        return value

    def _class(self, name: str) -> type:
        """A class of this package that is loaded here already; no import, no class of learners'."""
        if name in Record._kinds:
            return Record._kinds[name]
        module, _, qualname = name.partition(":")
        if not self.lends:
            __import__(module)
        found = vars(sys.modules[module]).get(qualname) if module.startswith(OURS) else None
        plain = is_dataclass(found) or hasattr(found, "_fields")
        if not isinstance(found, type) or (self.lends and not plain):
            raise Garbled(f"{name} is not a class that may be sent")
        return found

    # errors

    def encode_error(self, error: BaseException, blobs: list[bytes]) -> dict:
        """An exception: its name and text, and the nearest class that the other side knows."""
        if (number := getattr(error, "_handle_here", None)) is not None:
            return {"yours": number}
        mro = type(error).__mro__
        known = next((c.__name__ for c in mro if c in _KNOWN_ERRORS), "RuntimeError")
        content = {"error": type(error).__name__, "known": known, "text": _text_of(error)}
        if self.lends:
            content["handle"] = self._number(error)
        else:  # the learner's line is only known here
            with suppress(Exception):
                frame = learners_frame(error)
                content["frame"] = frame and [frame.lineno, frame.line]
        if isinstance(error, NotYet):
            content["not_yet"] = [error.message, error.misconception, error.hint]
        return content

    def decode_error(self, content: dict) -> BaseException:
        if "yours" in content:
            return self.given[content["yours"]]
        if "not_yet" in content:
            message, misconception, hint = (str(x)[:2000] for x in content["not_yet"])
            return NotYet(message, misconception=misconception[:80], hint=hint)
        base = {c.__name__: c for c in _KNOWN_ERRORS}[content["known"]]
        name = str(content["error"])[:60]
        body = {"__str__": _told, "told": str(content["text"])[:2000]}
        name = name if name.isidentifier() else "Exception"
        try:
            error = type(name, (base,), body)(body["told"])
        except TypeError:  # one that wants more to be made of, such as UnicodeDecodeError
            error = type(
                name, (ValueError if issubclass(base, ValueError) else RuntimeError,), body
            )()
        error._handle_here = content.get("handle")
        error.frame_there = content.get("frame")
        return error


_KNOWN_ERRORS = {
    *(e for e in vars(builtins).values() if isinstance(e, type) and issubclass(e, Exception)),
    *(e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.LabError)),
    SystemExit, torch.linalg.LinAlgError, torch.OutOfMemoryError,
}  # fmt: skip


def _without_subclass(value):
    """A learner's own kind of number, text or list as a plain one: no method of it goes along."""
    base = next(c for c in type(value).__mro__ if c in SIMPLE)
    return base.__int__(value) if base is int else base(value)


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _told(error) -> str:
    return error.told


def _text_of(error: BaseException) -> str:
    try:
        return str(error)[:2000]
    except Exception:  # noqa: BLE001  a learner's own class may do anything in __str__
        return ""


def _as_bytes(storage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _bytes_of(storage) -> bytes:
    return _as_bytes(storage).cpu().numpy().tobytes()


def _kernel_text(value) -> str:
    """The source of a Triton kernel, compiled or interpreted; empty for anything else."""
    import inspect

    if isinstance(value, type) or not (hasattr(value, "fn") and hasattr(value, "__getitem__")):
        return ""
    try:
        return inspect.getsource(value.fn)
    except (OSError, TypeError):
        return "?"


class Peer:
    """One end of the wire: requests, and serving the other end's while waiting for the answer."""

    lends = False

    def __init__(self, channel: Channel):
        self.channel, self.codec, self.depth = channel, Codec(self, self.lends), 0

    def post(self, message: dict, blobs: list[bytes]) -> None:
        text = json.dumps({**message, "sizes": [len(b) for b in blobs]}).encode()
        if len(text) > MAX_TEXT or sum(map(len, blobs)) > MAX_BYTES:
            raise Garbled(f"more than {MAX_BYTES >> 20} MiB at once")
        self.channel.send(text, b"".join(blobs))

    def receive(self) -> tuple[dict, list[bytes]]:
        text, blob = self.channel.receive()
        message, blobs, start = json.loads(text), [], 0
        for size in message.pop("sizes"):
            blobs.append(blob[start : start + size])
            start += size
        return message, blobs

    def request(self, message: dict, blobs: list[bytes]):
        """Send, and serve the other end's own requests until the answer comes."""
        if self.depth > MAX_DEPTH:
            endless = RecursionError("calls from one process to the other and back, without an end")
            raise Raised(endless)
        self.depth += 1
        try:
            self.post(message, blobs)
            while True:
                reply, blobs = self.receive()
                self.settle(reply, blobs)
                if reply["do"] == "return":
                    return self.codec.decode(reply["value"], blobs)
                if reply["do"] == "raise":
                    raise Raised(self.codec.decode_error(reply["error"]))
                self.serve(reply, blobs)
        finally:
            self.depth -= 1

    def serve(self, message: dict, blobs: list[bytes]) -> None:
        """Do what the other end asks for, and answer."""
        out: list[bytes] = []
        outer, self.codec.leaves_in = self.codec.leaves_in, []
        self.depth += 1
        try:
            answer = {"do": "return", "value": self.codec.encode(self.perform(message, blobs), out)}
        except (Stopped, EOFError, TimeoutError, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001  a learner's code may raise anything
            out = []
            answer = {"do": "raise", "error": self.codec.encode_error(error, out)}
        finally:
            self.depth -= 1
            self.codec.leaves_in = outer
        self.post({**answer, **self.extras(out)}, out)

    def call(self, handle: int, args: tuple, kwargs: dict, grid=None):
        """The other end calls what it knows by this number."""
        blobs: list[bytes] = []
        message = {"do": "call", "handle": handle}
        codec, outer = self.codec, self.codec.leaves_out
        codec.leaves_out, codec.calling = [], True
        try:
            message["args"] = [codec.encode(x, blobs) for x in args]
            message["kwargs"] = {k: codec.encode(v, blobs) for k, v in kwargs.items()}
            codec.calling = False
            if grid is not None:
                message["grid"] = list(grid)
            return self.ask(message, blobs)
        finally:
            codec.leaves_out, codec.calling = outer, False

    def gradients(self, handle: int, upstream: Tensor) -> list:
        """Of what the other end knows by this number, with respect to what it was called with."""
        blobs: list[bytes] = []
        message = {"do": "gradients", "handle": handle}
        message["upstream"] = self.codec.encode(upstream.detach(), blobs)
        return self.ask(message, blobs)

    def give_gradients(self, message: dict, blobs: list[bytes]) -> list:
        value, leaves = self.codec.given[message["handle"]]
        upstream = self.codec.decode(message["upstream"], blobs)
        if not leaves:
            return []
        return list(
            torch.autograd.grad(value, leaves, upstream, allow_unused=True, retain_graph=True)
        )

    def get(self, handle: int, name: str):
        """An attribute of what the other end knows by this number."""
        return self.ask({"do": "get", "handle": handle, "name": name}, [])

    def ask(self, message: dict, blobs: list[bytes]):
        try:
            return self.request({**message, **self.extras(blobs)}, blobs)
        except Raised as raised:
            raise raised.error from None

    def arguments(self, message: dict, blobs: list[bytes]) -> tuple[list, dict]:
        decode = self.codec.decode
        args = [decode(x, blobs) for x in message["args"]]
        return args, {str(k): decode(v, blobs) for k, v in message["kwargs"].items()}

    def extras(self, blobs: list[bytes]) -> dict:
        """What goes along with every message."""
        return {}

    def settle(self, message: dict, blobs: list[bytes]) -> None:
        """Take what came along with a message."""

    def perform(self, message: dict, blobs: list[bytes]):
        raise NotImplementedError


class Raised(Exception):
    """The other end's exception, wrapped: it is no fault of the wire."""

    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error


class _Graft(torch.autograd.Function):
    """A learner's tensor in the judge's graph: its gradient is asked for over the wire."""

    @staticmethod
    def forward(ctx, peer, handle: int, value: Tensor, *leaves: Tensor) -> Tensor:
        ctx.peer, ctx.handle = peer, handle
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        return None, None, None, *ctx.peer.gradients(ctx.handle, upstream)

"""Recordings decoded event by event, from the descriptions of the formats alone: nothing of the library is used.

Each decoder makes (column, row, on, microseconds) of every event of the bytes of a file, in their order.
"""

import struct
from io import BytesIO
from itertools import accumulate

import numpy as np

Decoded = list[tuple[int, int, int, int]]


def after_header(data: bytes, mark: bytes) -> int:
    """Where the lines that begin with a mark end."""
    at = 0
    while data[at : at + 1] == mark:
        at = data.index(b"\n", at) + 1
    return at


def dvs128(data: bytes) -> Decoded:
    """AEDAT 2.0, as jAER shows it: polarity in bit 0 (0 is on), x in bits 1-7 from the right, y in 8-14 from below."""
    pairs = struct.iter_unpack(">II", data[after_header(data, b"#") :])
    return [(127 - (a >> 1) % 128, 127 - (a >> 8) % 128, 1 - a % 2, t) for a, t in pairs if not a & 0x8000]


def davis240(data: bytes) -> Decoded:
    """AEDAT 2.0: bit 31 no event, y in bits 22-30 from below, x in 12-21 from the right, on in 11, external in 10."""
    pairs = struct.iter_unpack(">II", data[after_header(data, b"#") :])
    return [(239 - (a >> 12) % 1024, 179 - (a >> 22) % 512, (a >> 11) % 2, t) for a, t in pairs if not a & 0x8000_0400]


def aedat31(data: bytes) -> Decoded:
    """Packets: 28 bytes of header; events of polarity have type 1 and 8 bytes: valid, on, 15 bits of y and x; time."""
    at, found = data.index(b"#!END-HEADER\r\n") + 14, []
    while at < len(data):
        kind, _, size, _, overflow, _, number, _ = struct.unpack("<2h6i", data[at : at + 28])
        for place in range(at + 28, at + 28 + size * number, size):
            word, t = struct.unpack("<II", data[place : place + 8])
            if kind == 1 and word % 2:
                found.append((word >> 17, (word >> 2) % 2**15, (word >> 1) % 2, t + overflow * 2**31))
        at += 28 + size * number
    return found


def nmnist(data: bytes) -> Decoded:
    """40 bits of an event: 8 of x, 8 of y, polarity, 23 of time; y = 240 says that 2^13 us have gone by."""
    found, lost = [], 0
    for at in range(0, len(data), 5):
        word = int.from_bytes(data[at : at + 5], "big")
        x, y, on, t = word >> 32, (word >> 24) % 256, (word >> 23) % 2, word % 2**23
        lost += y == 240
        if y != 240:
            found.append((x, y, on, t + lost * 2**13))
    return found


def dat(data: bytes) -> Decoded:
    """Two bytes after the header, then uint32 of time and uint32 of 14 bits of x, 14 of y and 4 of polarity."""
    events = struct.iter_unpack("<II", data[after_header(data, b"%") + 2 :])
    return [(word % 2**14, (word >> 14) % 2**14, (word >> 28) % 2, t) for t, word in events]


def evt2(data: bytes) -> Decoded:
    """Prophesee .raw, 32-bit words: 4 bits of kind; of an event (0 off, 1 on) 6 bits of time, 11 of x, 11 of y; of time
    (8) its 28 higher bits."""
    found, high = [], 0
    for (word,) in struct.iter_unpack("<I", data[after_header(data, b"%") :]):
        kind = word >> 28
        if kind == 8:
            high = word % 2**28
        elif kind < 2:
            found.append(((word >> 11) % 2**11, word % 2**11, kind, high << 6 | (word >> 22) % 2**6))
    return found


def evt3(data: bytes) -> Decoded:
    """Prophesee .raw, 16-bit words: 4 bits of kind, and 12 of y (0), of on and x (2), of on and the first x of a vector
    (3), of which columns of 12 or 8 have an event (4, 5), of the lower (6) or higher (8) half of the time."""
    found, y, base, on, low, high = [], 0, 0, 0, 0, 0
    for (word,) in struct.iter_unpack("<H", data[after_header(data, b"%") :]):
        kind, value = word >> 12, word % 2**12
        if kind == 0:
            y = value % 2**11
        elif kind == 2:
            found.append((value % 2**11, y, value >> 11, high << 12 | low))
        elif kind == 3:
            base, on = value % 2**11, value >> 11
        elif kind in (4, 5):
            wide = {4: 12, 5: 8}[kind]
            found += [(base + at, y, on, high << 12 | low) for at in range(wide) if value >> at & 1]
            base += wide
        elif kind == 6:
            low = value
        elif kind == 8:
            high = value
    return found


def aedat4(data: bytes) -> Decoded:
    """Packets of a stream (here the first) and a size, compressed (0: not, 1: LZ4), each a flatbuffer of structs of 16
    bytes: time, x, y and on."""
    at = 14  # after #!AER-DAT4.0\r\n
    (size,) = struct.unpack("<I", data[at : at + 4])
    header, at, found = data[at + 4 : at + 4 + size], at + 4 + size, []
    compression, table = (field(header, slot) for slot in (0, 1))
    compressed = compression is not None and struct.unpack("<i", header[compression : compression + 4])[0]
    (end,) = struct.unpack("<q", header[table : table + 8]) if table is not None else (-1,)
    while at < (len(data) if end < 0 else end):
        stream, size = struct.unpack("<ii", data[at : at + 8])
        packet, at = data[at + 8 : at + 8 + size], at + 8 + size
        packet = (lz4(packet) if compressed else packet)[4:]
        if stream == 0 and (events := field(packet, 0)) is not None:
            events += struct.unpack("<I", packet[events : events + 4])[0]
            (count,) = struct.unpack("<I", packet[events : events + 4])
            structs = struct.iter_unpack("<qhh?3x", packet[events + 4 : events + 4 + 16 * count])
            found += [(x, y, int(on), t) for t, x, y, on in structs]
    return found


def field(buffer: bytes, slot: int) -> int | None:
    """Where a field of the root table of a flatbuffer lies; None where it is left out."""
    (root,) = struct.unpack("<I", buffer[:4])
    fields = root - struct.unpack("<i", buffer[root : root + 4])[0]
    size = struct.unpack("<H", buffer[fields : fields + 2])[0]
    place = fields + 4 + 2 * slot
    offset = struct.unpack("<H", buffer[place : place + 2])[0] if 4 + 2 * slot < size else 0
    return root + offset if offset else None


def lz4(data: bytes) -> bytes:
    """A frame of LZ4 without a dictionary; the checksums are passed over."""
    flags, at, out = data[4], 7 + 8 * (data[4] >> 3 & 1), bytearray()
    while size := struct.unpack("<I", data[at : at + 4])[0]:
        block, at = data[at + 4 : at + 4 + size % 2**31], at + 4 + size % 2**31 + 4 * (flags >> 4 & 1)
        if size >> 31:
            out += block
            continue
        place = 0

        def length(start: int, block: bytes = block) -> int:
            nonlocal place
            more = start == 15
            while more:
                start, place, more = start + block[place], place + 1, block[place] == 255
            return start

        while place < len(block):
            token, place = block[place], place + 1
            literals = length(token >> 4)
            out += block[place : place + literals]
            place += literals
            if place < len(block):
                back, place = int.from_bytes(block[place : place + 2], "little"), place + 2
                for _ in range(4 + length(token & 15)):
                    out.append(out[-back])
    return bytes(out)


def arrays(data: bytes) -> Decoded:
    """Of tonic (one array of x, y, t, p), SpikingJelly (t, x, y, p) and ES-ImageNet (pos, neg: row, column, time)."""
    stored = np.load(BytesIO(data))
    if isinstance(stored, np.ndarray):
        return [(int(e["x"]), int(e["y"]), int(e["p"]), int(e["t"])) for e in stored]
    if "pos" in stored:
        events = [(int(x), int(y), on, int(t)) for on, name in enumerate(("neg", "pos")) for y, x, t in stored[name]]
        return sorted(events, key=lambda event: event[3])
    return [tuple(map(int, event)) for event in zip(*(stored[name] for name in "xypt"), strict=True)]


DECODERS = {
    "dvs128": ("a.aedat", dvs128, (128, 128)),  # name of a file, decoder, height and width of the sensor
    "davis240": ("a.aedat", davis240, (180, 240)),
    "aedat31": ("a.aedat", aedat31, (260, 346)),
    "aedat4": ("a.aedat4", aedat4, (260, 346)),
    "nmnist": ("a.bin", nmnist, (34, 34)),
    "dat": ("a.dat", dat, (240, 304)),
    "evt2": ("a.raw", evt2, (240, 304)),
    "evt3": ("a.raw", evt3, (240, 304)),
    "tonic": ("a.npy", arrays, (240, 304)),
    "spikingjelly": ("a.npz", arrays, (240, 304)),
    "es_imagenet": ("a.npz", arrays, (240, 304)),
}


def counts(events: Decoded, T: int, by: str, height: int, width: int) -> np.ndarray:
    """[T, 2, H, W], one event after the other."""
    made = np.zeros((T, 2, height, width), int)
    first, last = min(t for *_, t in events), max(t for *_, t in events)
    for number, (x, y, on, t) in enumerate(events):
        frame = min(number // (len(events) // T), T - 1) if by == "count" else (t - first) * T // (last - first + 1)
        made[frame, on, y, x] += 1
    return made


# ---- files of random bits where the format leaves them free


def random_file(kind: str, rng: np.random.Generator, count: int = 300) -> bytes:
    """A made-up recording, with what is not an event in between; places, polarity and pauses are drawn."""
    if kind == "aedat4":
        return aedat4_file(rng)
    width, height = {"davis240": (240, 180), "dvs128": (128, 128), "nmnist": (34, 34)}.get(kind, (304, 240))
    width -= 20 * (kind == "evt3")  # a vector reaches to the right
    x, y, on = (rng.integers(0, most, count).tolist() for most in (width, height, 2))
    t = list(accumulate(rng.integers(0, 60, count).tolist(), initial=50))[:count]
    if kind == "aedat31":  # the clock of 31 bits is full in the middle
        t = [time - t[count // 2] + 2**31 for time in t]
    odd = (rng.random(count) < 0.1).tolist()
    rows = list(zip(x, y, on, t, odd, strict=True))
    if kind in ("dvs128", "davis240"):
        chip = b"# AEChip: DAVIS240C\r\n" if kind == "davis240" else b""
        at = (1, 8, 0, 15) if kind == "dvs128" else (12, 22, 11, 31)
        words = [x << at[0] | y << at[1] | on << at[2] | odd << at[3] for x, y, on, _, odd in rows]
        return (
            b"#!AER-DAT2.0\r\n" + chip + b"".join(struct.pack(">II", w, r[3]) for w, r in zip(words, rows, strict=True))
        )
    if kind == "nmnist":
        words = [x << 32 | (240 if odd else y) << 24 | on << 23 | t for x, y, on, t, odd in rows]
        return b"".join(word.to_bytes(5, "big") for word in words)
    if kind == "dat":
        body = b"".join(struct.pack("<II", t, x | y << 14 | on << 28) for x, y, on, t, _ in rows)
        return b"% Data file\n% Width 304\n% Height 240\n\x0c\x08" + body
    if kind == "evt2":
        words = []
        for x, y, on, t, odd in rows:
            words += [8 << 28 | t >> 6, on << 28 | t % 64 << 22 | x << 11 | y] + [10 << 28] * odd  # and triggers
        return b"% evt 2.0\n" + struct.pack(f"<{len(words)}I", *words)
    if kind == "evt3":
        words = []
        for x, y, on, t, odd in rows:
            words += [8 << 12 | t >> 12, 6 << 12 | t % 2**12, y]
            words += [3 << 12 | on << 11 | x, 4 << 12 | 0b100000000011, 5 << 12 | 0b10000001] if odd else []
            words.append(2 << 12 | on << 11 | x)
        return b"% evt 3.0\n" + struct.pack(f"<{len(words)}H", *words)
    if kind == "aedat31":
        events = [struct.pack("<II", (not odd) | on << 1 | y << 2 | x << 17, t % 2**31) for x, y, on, t, odd in rows]
        body = b"".join(
            struct.pack("<2h6i", at % 30 < 20, 1, 8, 4, t[at] >> 31, 10, 10, 10) + b"".join(events[at : at + 10])
            for at in range(0, count, 10)
        )
        return b"#!AER-DAT3.1\r\n#Source 1: DAVIS346\r\n#!END-HEADER\r\n" + body
    stored = BytesIO()
    values = dict(t=np.array(t), x=np.array(x), y=np.array(y), p=np.array(on))
    if kind == "tonic":
        made = np.zeros(count, [("x", "<i2"), ("y", "<i2"), ("t", "<i8"), ("p", "?")])
        for name, value in values.items():
            made[name] = value
        np.save(stored, made)
    elif kind == "spikingjelly":
        np.savez(stored, **values)
    else:
        events, times = np.stack((y, x), 1), np.arange(count)  # a time for each, so that their order is one
        events = np.concatenate((events, times[:, None]), 1).astype("<i2")
        np.savez(stored, pos=events[values["p"] == 1], neg=events[values["p"] == 0])
    return stored.getvalue()


def aedat4_file(rng: np.random.Generator, packets: int = 3, each: int = 50) -> bytes:
    """Not compressed, with a packet of another stream after each packet of events."""
    info = (
        b'<dv version="2.0"><node name="outInfo" path="/outInfo/">'
        b'<node name="0" path="/outInfo/0/"><attr key="typeIdentifier" type="string">EVTS</attr>'
        b'<node name="info" path="/outInfo/0/info/"><attr key="sizeX" type="int">346</attr>'
        b'<attr key="sizeY" type="int">260</attr></node></node>'
        b'<node name="1" path="/outInfo/1/"><attr key="typeIdentifier" type="string">TRIG</attr></node></node></dv>'
    )
    header = struct.pack("<I4s5H2xiiqII", 20, b"IOHE", 10, 20, 4, 8, 16, 12, 0, -1, 4, len(info)) + info + b"\0"
    made = [b"#!AER-DAT4.0\r\n", struct.pack("<I", len(header)), header]
    t = 2**33
    for _ in range(packets):
        events = b""
        for x, y, on, step in zip(*(rng.integers(0, most, each).tolist() for most in (346, 260, 2, 90)), strict=True):
            t += step
            events += struct.pack("<qhh?3x", t, x, y, on)
        for stream, name, body in ((0, b"EVTS", struct.pack("<I", each) + events), (1, b"TRIG", bytes(4))):
            packet = struct.pack("<I4s3H2xiI4x", 16, name, 6, 8, 4, 8, 8) + body
            made.append(struct.pack("<iiI", stream, len(packet) + 4, len(packet)) + packet)
    return b"".join(made)

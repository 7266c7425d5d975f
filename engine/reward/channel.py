"""Messages between the engine and a worker's zygote. Standard library only: both sides run this file."""

import json
import socket
import struct


class Channel:
    """Messages over a stream socket: lengths, a JSON header, then the blobs that it names with their sizes."""

    def __init__(self, fd):
        self.socket = socket.socket(fileno=fd)

    def receive(self):
        """A header, with its blobs by name under "blobs"; None when the other side is gone."""
        start = self._exactly(4)
        if start is None:
            return None
        header = self._exactly(struct.unpack("<I", start)[0])
        if header is None:
            return None
        message = json.loads(bytes(header))
        blobs = {}
        for name, size in message.get("blobs", []):
            blobs[name] = self._exactly(size)
            if blobs[name] is None:
                return None
        message["blobs"] = blobs
        return message

    def send(self, message, blobs):
        header = json.dumps({**message, "blobs": [(name, len(data)) for name, data in blobs.items()]}).encode()
        self.socket.sendall(b"".join([struct.pack("<I", len(header)), header, *blobs.values()]))

    def _exactly(self, size):
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            count = self.socket.recv_into(view[got:])
            if count == 0:
                return None
            got += count
        return data

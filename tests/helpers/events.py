"""The events of a TensorBoard file, without TensorFlow."""

import struct


def events_of(path):
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while len(data) > 16:
        (size,) = struct.unpack("<Q", data[:8])
        if len(data) < 16 + size:  # a killed process left half of an event
            return
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]

"""Every message that crosses a process boundary."""

from atroposlib.wire.columns import Group, build_group, decode_groups, encode_group, read_blobs

__all__ = ["Group", "build_group", "decode_groups", "encode_group", "read_blobs"]

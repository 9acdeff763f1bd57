"""The teacher protocol: a policy that is paid for what its guidance does to a frozen student."""

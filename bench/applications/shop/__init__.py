"""The Django application of the peers that need one."""

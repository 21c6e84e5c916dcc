"""Where a control plane keeps what must not be lost: one interface, two implementations."""

"""Events held back because their address isn't known to take any, and how that is found out."""

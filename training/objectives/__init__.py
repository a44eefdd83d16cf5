"""One method, one file. Each is a frozen dataclass of its few constants with a short ``__call__``."""

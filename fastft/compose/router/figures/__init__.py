"""The figures of an evaluated router, and how they are shown."""

"""fastft: from a dump of shared chats to a chat model on cheap GPUs.

This package imports nothing on its own, so that `import fastft` and `fastft --help` stay under 0.1 s; every verb imports
what it needs when it is called. docs/architecture.md shows the structure.
"""

__version__ = "0.2.0"

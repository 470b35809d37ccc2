"""Raw dumps of shared chats in, markdown conversations out; every input accounted for. Run `python -m cleaning --help`."""

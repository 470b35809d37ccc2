"""Raw dumps of shared chats in, markdown conversations out; every input accounted for (`python -m cleaning --help`)."""

"""Readers of dumps: what the command line names is opened, and each record becomes one or several conversations.

inputs.py      files, saved pages, standard input, datasets on the Hub
formats.py     the table of formats, and how a record's format is recognised

lists.py       formats in which a record is a list of turns: ShareGPT, OpenAI's messages, WildChat, Alpaca, Claude's export
prompted.py    a prompt and its answer; two answers and a preference
trees.py       trees of messages: ChatGPT's export, OpenAssistant
pages.py       saved pages of sharegpt.com and ChatGPT
rejected.py    rows of the cleaner's own rejected.jsonl

turns.py       what every reader produces, and what the readers share
marks.py       what a dump says about its answers: not to be learned, cut
eras.py        what sharegpt.com had done to a text before it was shared
"""

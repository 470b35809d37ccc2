"""One model behind OpenAI's API, in a process of its own: `python -m fastft.serve.worker --model DIR`."""

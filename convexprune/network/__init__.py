"""A torch model as it runs: data, forwards, where layers are seen, what follows them, links, removed neurons."""

"""Pruners: what is wanted of layers, and the methods that answer, one a file.

Those that solve: ``net_trim``, ``budget``. Those that score: ``random``, ``magnitude``, ``wanda``, ``sparsegpt``,
``synflow``. Those that sample: ``lowner``, ``mussay``, ``pfp``, ``corenet``, ``sipp``, ``uniform``, ``largest``.
"""

"""Names of ``convexprune.network.choosing`` for packages that still import them from here."""

from convexprune.network import choosing

by_first_names = choosing.by_first_names
check_patterns = choosing.check_patterns
excluding = choosing.excluding
is_chosen = choosing.is_chosen
is_named = choosing.is_named
looked_up = choosing.looked_up
name_patterns = choosing.name_patterns
unmatched = choosing.unmatched

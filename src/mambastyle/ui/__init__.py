"""The page of `mambastyle serve`: four tabs over the facade, on this machine alone. Needs the extra [ui]."""

"""Which experts the target will choose, from states that are computed anyway."""

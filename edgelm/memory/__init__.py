"""Everything that owns big memory: units, plan, window, stores, arena, meter. Knows no architecture and no backend."""

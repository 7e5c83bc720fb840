"""What a surrogate must beat: persistence, ridge autoregressions, and networks beside one; fitted once for a store."""

"""Joint training of FairDiff's three networks in JAX, with fairness."""

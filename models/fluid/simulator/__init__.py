"""A simulator of gas transmission networks: topology, hydraulics, temperatures, scenarios and days."""

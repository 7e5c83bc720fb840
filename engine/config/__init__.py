"""A run's JSON file as typed sections: what each key means, and what is refused."""

"""Load for a server, from outside: how soon it answers, and whether it stays upright."""

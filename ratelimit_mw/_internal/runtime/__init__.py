"""Tools that know nothing of rate limiting: forks, threads, event loops, compiled leaves."""

"""Values of rate limiting: limits, money, periods, charges and the backend's answers."""

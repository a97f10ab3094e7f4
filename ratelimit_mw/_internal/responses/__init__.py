"""Headers and bodies of responses, made from a decision."""

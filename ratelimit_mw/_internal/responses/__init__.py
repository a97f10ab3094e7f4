"""What goes over the wire: headers and bodies, made from a decision by pure functions."""

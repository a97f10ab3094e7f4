"""Tools of the documentation: they make pages of the code, and the site of the pages."""

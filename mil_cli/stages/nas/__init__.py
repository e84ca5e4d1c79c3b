"""Neural architecture search: choosing a smaller architecture, one method a file."""

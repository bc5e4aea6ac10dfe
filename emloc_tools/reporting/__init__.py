"""What our folders hold and where it comes from: as records, and as a page with plots."""

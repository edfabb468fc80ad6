"""What adaptation and immunization share: the loss, batches, class pictures, captions."""

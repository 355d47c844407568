"""What smi_fast is compared with: the published loop and the published losses."""

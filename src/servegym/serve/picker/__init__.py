"""An endpoint picker: it tells a gateway, over Envoy's external processing, where requests go."""

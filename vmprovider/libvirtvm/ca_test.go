package libvirtvm

// testCA is a certificate of nobody.
var testCA = []byte("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")

module github.com/solstice-ci/solstice-bareforge

go 1.26.0

require github.com/solstice-ci/solstice-go v0.0.0

require (
	github.com/cenkalti/backoff/v5 v5.0.3 // indirect
	golang.org/x/net v0.61.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
	golang.org/x/text v0.43.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260928230214-8a89bd6388cc // indirect
	google.golang.org/grpc v1.85.0 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
)

replace github.com/solstice-ci/solstice-go => ../..

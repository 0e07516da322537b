// Package bench compares Solstice's drivers with the bare clients below them, and
// with other libraries for the same work, on the same servers and in the same
// run. It is a module of its own, so that what it compares with is no dependency
// of Solstice. docs/performance.md has the results; .mise/tasks/test/bench runs
// it.
package bench

package solstice_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// downloads has an image to ready, and says when it was asked to and by what it
// ended.
type downloads struct {
	vmprovider.Provider
	asked chan struct{}
	ended chan error
}

func (d *downloads) PrepareImage(ctx context.Context, _ vmprovider.Image) error {
	d.asked <- struct{}{}
	select {
	case err := <-d.ended:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TestImageFirst: a pool takes its first job when its image is ready, however
// often that fails; the others go on.
func TestImageFirst(t *testing.T) {
	p := newPlant(t, testenv.SQLite(t))
	d := &downloads{asked: make(chan struct{}), ended: make(chan error)}
	eng, _ := p.start(t, func(c *solstice.Config) {
		other := c.Pools[0]
		other.Name, other.Labels = "other", []string{"other"}
		c.Pools = append(c.Pools, other)
		d.Provider = other.Provider
		c.Pools[1].Provider = d
	})
	<-d.asked
	r := p.submit(t, eng, "jobs: { a: { steps: [{ run: 'true' }] }, b: { runs-on: other, steps: [{ run: 'true' }] } }")
	eventually(t, "the other pool's job is over", func() bool {
		now, err := eng.GetRun(t.Context(), r.ID)
		return err == nil && now.Jobs[0].State == solstice.JobSucceeded
	})
	d.ended <- errors.New("the download broke off")
	<-d.asked
	now, err := eng.Job(t.Context(), r.Jobs[1].ID)
	if err != nil || now.State != solstice.JobQueued {
		t.Errorf("without its image the job is %s, %v", now.State, err)
	}
	eventually(t, "it says why", func() bool {
		w, err := eng.Waiting(t.Context(), r.Jobs[1].ID)
		return err == nil && w.Reason == solstice.WaitPoolFull && strings.Contains(w.Message, "other at test: its image is not ready: the download broke off")
	})
	d.ended <- nil
	finishWithin(t, eng, r.ID, time.Minute)
}

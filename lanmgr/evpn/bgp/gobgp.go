package bgp

import (
	"context"
	"log/slog"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/server"
)

// newServer returns a server that logs warnings and errors only: gobgp logs each step of a session at level info.
func newServer(log *slog.Logger) *server.BgpServer {
	return server.NewBgpServer(server.LoggerOption(slog.New(warningHandler{log.Handler()}), nil))
}

type warningHandler struct{ slog.Handler }

func (w warningHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn && w.Handler.Enabled(ctx, level)
}

func (w warningHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return warningHandler{w.Handler.WithAttrs(attrs)}
}

func (w warningHandler) WithGroup(name string) slog.Handler {
	return warningHandler{w.Handler.WithGroup(name)}
}

func timers(hold time.Duration) *api.Timers {
	if hold == 0 {
		hold = HoldTime
	}
	seconds := uint64(hold / time.Second)
	return &api.Timers{Config: &api.TimersConfig{
		HoldTime: seconds, KeepaliveInterval: max(1, seconds/3),
		ConnectRetry: uint64(connectRetry / time.Second), IdleHoldTimeAfterReset: uint64(connectRetry / time.Second),
	}}
}

// gracefulRestart asks peers to keep our routes for that time after a session is lost (RFC 4724).
func gracefulRestart(restart time.Duration) *api.GracefulRestart {
	return &api.GracefulRestart{Enabled: true, RestartTime: uint32(restart / time.Second)}
}

// families returns EVPN as the only address family.
func families() []*api.AfiSafi {
	family := &api.Family{Afi: api.Family_AFI_L2VPN, Safi: api.Family_SAFI_EVPN}
	return []*api.AfiSafi{{
		Config:            &api.AfiSafiConfig{Family: family, Enabled: true},
		MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: true}},
	}}
}

# god: `god load outbox.god`. The pid file holds a bare number. Memory, age, CPU and flapping are the
# parent's to watch; god restarts what has ended as a whole. It wants the folder to be there:
#   install -d -o shop -g shop -m 0700 /var/lib/shop/outbox
shop = "/srv/shop"
folder = "/var/lib/shop/outbox"
command = "#{shop}/venv/bin/outbox workers"
# OUTBOX_URL and other secrets: lines with NAME=VALUE, mode 0600.
secrets = File.readlines("/etc/shop/outbox.env").grep(/\A\w+=/).map { |line| line.chomp.split("=", 2) }.to_h

God.watch do |w|
  w.name     = "outbox-consumers"
  w.dir      = "#{shop}/current"
  w.uid      = "shop"
  w.gid      = "shop"
  # PWD: by its link, so that a restart starts the code to which that leads by then.
  w.env      = secrets.merge("OUTBOX_PID_DIR" => folder, "PWD" => "#{shop}/current")
  w.pid_file = "#{folder}/outbox-consumers.pid"
  w.interval = 10.seconds

  w.start   = "#{command} start --id consumers -- outbox-consume shop.consumers -p 4 --max-memory 100M"
  w.stop    = "#{command} stop --id consumers --timeout 50 --kill"
  w.restart = "#{command} restart --id consumers"

  w.start_grace   = 60.seconds
  w.stop_timeout  = 60.seconds
  w.restart_grace = 60.seconds

  w.keepalive
end

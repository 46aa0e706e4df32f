#!/bin/sh
# Back up the embedded database, and tell Prometheus when that last succeeded. Run it as the service's user, once a
# day: by order-tracking-backup.timer, or by cron. If a step fails, the time stays old, and the alert BackupIsOld fires.
set -eu

# A folder that only this user can enter.
backups=/var/backups/order-tracking
days=14
# The folder that node_exporter reads: its option --collector.textfile.directory.
metrics=/var/lib/node_exporter

started=$(date +%s)
order-tracking backup "$backups/tracking-$(date +%FT%H%M%S).dump"
# Copy the dump to another machine here, for example with rsync. A dump on the same disk is lost with the database.
find "$backups" -name 'tracking-*.dump' -mtime "+$days" -delete

# Renamed when complete, so that node_exporter never reads half a file.
echo "order_tracking_backup_timestamp_seconds $started" >"$metrics/order_tracking.prom.new"
chmod 644 "$metrics/order_tracking.prom.new"
mv "$metrics/order_tracking.prom.new" "$metrics/order_tracking.prom"

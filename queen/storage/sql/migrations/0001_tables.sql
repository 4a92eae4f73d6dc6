-- The tables of the segment log.
--
-- Rules they keep (docs/discussion/storage.md): `bucket` is the first column of every primary key, unique index,
-- WHERE and JOIN of a distributed table; queues, consumer_groups, deleted_queues and meta are small, rarely
-- written and copied to every node (reference tables on Citus); every constraint is named for its rule.

CREATE TABLE queen.meta (
    only_row boolean NOT NULL DEFAULT true,
    buckets integer NOT NULL,
    initialised_at timestamptz NOT NULL,
    CONSTRAINT meta_one_row PRIMARY KEY (only_row),
    CONSTRAINT meta_only_row_is_true CHECK (only_row),
    CONSTRAINT meta_buckets_in_range CHECK (buckets BETWEEN 1 AND 1024)
);

-- Reference table. `version` grows with every configure: a worker that pushes with an older one is told so.
CREATE TABLE queen.queues (
    queue_id uuid NOT NULL,
    name text NOT NULL,
    namespace text NOT NULL,
    task text NOT NULL,
    version bigint NOT NULL,
    lease_seconds integer NOT NULL,
    retry_limit integer NOT NULL,
    retry_delay_ms integer NOT NULL,
    priority integer NOT NULL,
    delayed_processing_seconds integer NOT NULL,
    window_buffer_seconds integer NOT NULL,
    max_size integer NOT NULL,
    ttl_seconds integer NOT NULL,
    dead_letter_queue boolean NOT NULL,
    dlq_after_max_retries boolean NOT NULL,
    retention_enabled boolean NOT NULL,
    retention_seconds integer NOT NULL,
    completed_retention_seconds integer NOT NULL,
    max_wait_time_seconds integer NOT NULL,
    encryption_enabled boolean NOT NULL,
    created_at timestamptz NOT NULL,
    CONSTRAINT queues_pkey PRIMARY KEY (queue_id),
    CONSTRAINT queues_name_unique UNIQUE (name)
);

-- Serve namespace and task pops.
CREATE INDEX queues_by_namespace ON queen.queues (namespace, task);

CREATE INDEX queues_by_task ON queen.queues (task);

-- Reference table: what a deleted queue left behind, until the sweep has removed it in bounded steps.
CREATE TABLE queen.deleted_queues (
    queue_id uuid NOT NULL,
    name text NOT NULL,
    deleted_at timestamptz NOT NULL,
    CONSTRAINT deleted_queues_pkey PRIMARY KEY (queue_id)
);

-- Reference table: a group's subscription, decided at its first pop on the queue and then kept.
-- Messages created before `start_at` are not for this group (NULL: all are). `floor_at` is what pops keep to: the same,
-- until somebody moves the group to where it is to go on, which may be before its start.
CREATE TABLE queen.consumer_groups (
    queue_id uuid NOT NULL,
    name text NOT NULL,
    mode text NOT NULL,
    start_at timestamptz,
    floor_at timestamptz,
    created_at timestamptz NOT NULL,
    CONSTRAINT consumer_groups_pkey PRIMARY KEY (queue_id, name),
    CONSTRAINT consumer_groups_mode_known CHECK (mode IN ('all', 'new', 'from')),
    CONSTRAINT consumer_groups_start_fits_mode CHECK ((mode = 'all') = (start_at IS NULL))
);

-- One row per queue and bucket, written once: its lock orders the birth of partitions against the registration of
-- consumer groups, so that every partition has a cursor for every registered group.
CREATE TABLE queen.queue_buckets (
    bucket integer NOT NULL,
    queue_id uuid NOT NULL,
    CONSTRAINT queue_buckets_pkey PRIMARY KEY (bucket, queue_id)
);

-- A partition. Offsets first_offset <= o < next_offset are stored; they are dense.
-- last_id_prefix: milliseconds << 20 | sequence of its newest segment; message ids only grow.
-- keyed_min/keyed_max: range of the UUIDv7 transaction ids that went to transaction_ids (clocks far from ours).
-- oldest_at: creation of the oldest stored segment, NULL when there is none: retention finds work by it.
-- erased: stored messages that were deleted one by one; their offsets stay.
CREATE TABLE queen.partitions (
    bucket integer NOT NULL,
    partition_id uuid NOT NULL,
    queue_id uuid NOT NULL,
    name text NOT NULL,
    next_offset bigint NOT NULL DEFAULT 0,
    first_offset bigint NOT NULL DEFAULT 0,
    last_id_prefix bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL,
    last_created_at timestamptz,
    oldest_at timestamptz,
    keyed_min uuid,
    keyed_max uuid,
    erased integer NOT NULL DEFAULT 0,
    CONSTRAINT partitions_pkey PRIMARY KEY (bucket, partition_id),
    CONSTRAINT partitions_offsets_ordered CHECK (0 <= first_offset AND first_offset <= next_offset)
) WITH (fillfactor = 80);

-- Serves retention, registration of groups and deletion; oldest_at rarely changes, so pushes stay HOT.
CREATE INDEX partitions_by_queue_and_age ON queen.partitions (bucket, queue_id, oldest_at);

-- Serves the counts: few partitions have deleted messages.
CREATE INDEX partitions_with_erased ON queen.partitions (bucket, queue_id) WHERE erased > 0;

-- A segment: an immutable run of messages of one partition.
-- min_id/max_id: range of the UUIDv7 transaction ids in it that are checked by range (NULL: none).
-- transaction_ids: 16 bytes a message in order, zeros where the id is in queen.transaction_ids; NULL when minted
-- (each transaction id is the message id) or when all are there.
-- codec: 0 plain, 1 zstd; key_id: which key encrypted the body, NULL: none.
-- erased: places of deleted messages, from 0, whose lines are empty; NULL: none.
CREATE TABLE queen.segments (
    bucket integer NOT NULL,
    partition_id uuid NOT NULL,
    base_offset bigint NOT NULL,
    message_count integer NOT NULL,
    created_at timestamptz NOT NULL,
    id_prefix bigint NOT NULL,
    minted boolean NOT NULL,
    codec smallint NOT NULL,
    raw_bytes integer NOT NULL,
    min_id uuid,
    max_id uuid,
    key_id text,
    transaction_ids bytea,
    erased integer[],
    body bytea NOT NULL,
    CONSTRAINT segments_pkey PRIMARY KEY (bucket, partition_id, base_offset),
    CONSTRAINT segments_not_empty CHECK (message_count > 0),
    CONSTRAINT segments_offset_not_negative CHECK (base_offset >= 0),
    CONSTRAINT segments_codec_known CHECK (codec IN (0, 1))
);

-- Bodies are compressed by the worker or do not compress: PostgreSQL need not try.
ALTER TABLE queen.segments ALTER COLUMN body SET STORAGE EXTERNAL;

ALTER TABLE queen.segments ALTER COLUMN transaction_ids SET STORAGE EXTERNAL;

-- Serves exact dedup by range and the lookup of acked ids.
CREATE INDEX segments_by_transaction_id_range ON queen.segments (bucket, partition_id, max_id, min_id)
    WHERE max_id IS NOT NULL;

-- Serves new and moved cursors: what they have to skip.
CREATE INDEX segments_with_erased ON queen.segments (bucket, partition_id, base_offset) WHERE erased IS NOT NULL;

-- Transaction ids that are not UUIDv7 near our clock, one row each. transaction_key: see storage/ids.py.
CREATE TABLE queen.transaction_ids (
    bucket integer NOT NULL,
    partition_id uuid NOT NULL,
    transaction_key bytea NOT NULL,
    message_offset bigint NOT NULL,
    CONSTRAINT transaction_ids_pkey PRIMARY KEY (bucket, partition_id, transaction_key)
);

-- A consumer group's position in a partition: the next offset it has not consumed, and its lease if any.
-- ready_at: from when a pop may look here; NULL: idle, nothing pending. Set to NULL only under the lock of the
-- partition row, the one every push takes, so that no push is missed. While leased it is the lease's end.
-- acked: offsets of the leased run acked so far, so that a repeated ack counts once.
-- retry_count: failed deliveries of the current batch; attempt: deliveries since committed last moved.
-- skips: offsets from committed on that are not delivered: deleted, or dead-lettered by hand. NULL: none.
-- completed_lease_id: the last lease that ended by acks, so that a repeated ack is answered as the first was.
CREATE TABLE queen.cursors (
    bucket integer NOT NULL,
    partition_id uuid NOT NULL,
    group_name text NOT NULL,
    queue_id uuid NOT NULL,
    committed bigint NOT NULL,
    ready_at timestamptz,
    lease_expires_at timestamptz,
    lease_id uuid,
    lease_first bigint,
    lease_end bigint,
    lease_epoch integer,
    retry_count integer NOT NULL DEFAULT 0,
    attempt integer NOT NULL DEFAULT 0,
    acked int8multirange,
    skips int8multirange,
    completed_lease_id uuid,
    consumed_at timestamptz,
    CONSTRAINT cursors_pkey PRIMARY KEY (bucket, partition_id, group_name),
    CONSTRAINT cursors_committed_not_negative CHECK (committed >= 0),
    CONSTRAINT cursors_lease_whole_or_absent CHECK (
        num_nulls(lease_id, lease_expires_at, lease_first, lease_end, lease_epoch) IN (0, 5))
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- What is ready, oldest first: idle cursors are not in it, so a pop reads what is ready and nothing else.
CREATE INDEX cursors_ready ON queen.cursors (bucket, queue_id, group_name, ready_at) WHERE ready_at IS NOT NULL;

-- Serves the counts: few cursors skip anything.
CREATE INDEX cursors_with_skips ON queen.cursors (bucket, queue_id, group_name) WHERE skips IS NOT NULL;

-- Serves lease extension and give-back.
CREATE INDEX cursors_by_lease ON queen.cursors (bucket, lease_id) WHERE lease_id IS NOT NULL;

-- Messages set aside for a group after their last delivery, with their payload: `body` is one envelope line in the
-- form, codec and key of a segment body.
CREATE TABLE queen.dead_letters (
    bucket integer NOT NULL,
    partition_id uuid NOT NULL,
    message_offset bigint NOT NULL,
    group_name text NOT NULL,
    queue_id uuid NOT NULL,
    message_id uuid NOT NULL,
    retry_count integer NOT NULL,
    created_at timestamptz NOT NULL,
    failed_at timestamptz NOT NULL,
    codec smallint NOT NULL,
    minted boolean NOT NULL,
    key_id text,
    error text NOT NULL,
    body bytea NOT NULL,
    CONSTRAINT dead_letters_once_per_group PRIMARY KEY (bucket, partition_id, message_offset, group_name)
);

-- Serves the dead letter list of a queue, newest failure first.
CREATE INDEX dead_letters_by_queue ON queen.dead_letters (bucket, queue_id, failed_at);

-- What the statistics are made of: sums over the partitions of a queue and over the cursors of a group, so that no page
-- reads partitions or messages. Whoever changes what is summed adds a row to count_changes in the same transaction:
-- rows are only added, so nobody waits for anybody; queen.fold_counts moves them into counts every few seconds. What
-- is read is always the sum of both tables, which is exact.
-- Of a queue (group_name ''): stored = sum of next_offset, removed = sum of first_offset, erased, partitions.
-- Of a group: consumed = sum of committed, dead_letters = rows of dead_letters.
CREATE TABLE queen.counts (
    bucket integer NOT NULL,
    queue_id uuid NOT NULL,
    group_name text NOT NULL,
    stored bigint NOT NULL,
    removed bigint NOT NULL,
    erased bigint NOT NULL,
    partitions bigint NOT NULL,
    consumed bigint NOT NULL,
    dead_letters bigint NOT NULL,
    stored_at timestamptz,          -- when stored was last seen to grow
    CONSTRAINT counts_pkey PRIMARY KEY (bucket, queue_id, group_name)
);

-- kind: 1 stored, 2 removed, 3 erased, 4 partitions, 5 consumed, 6 dead_letters. No index: a few seconds of rows.
CREATE TABLE queen.count_changes (
    bucket integer NOT NULL,
    kind smallint NOT NULL,
    queue_id uuid NOT NULL,
    amount bigint NOT NULL,
    group_name text NOT NULL,
    CONSTRAINT count_changes_kind_known CHECK (kind BETWEEN 1 AND 6)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

-- Which queue a sweep is to look at, and when: nobody looks at all queues now and then.

-- A queue whose messages may expire, in a bucket; due_at: before that nothing in it can be too old. Written by configure, and
-- by every look.
CREATE TABLE queen.queue_sweeps (
    bucket integer NOT NULL,
    queue_id uuid NOT NULL,
    due_at timestamptz NOT NULL,
    CONSTRAINT queue_sweeps_pkey PRIMARY KEY (bucket, queue_id)
) WITH (fillfactor = 50);

-- Serves the sweeps: what is due, in the order of that.
CREATE INDEX queue_sweeps_by_due ON queen.queue_sweeps (bucket, due_at);

INSERT INTO queen.queue_sweeps (bucket, queue_id, due_at)
SELECT b.bucket, b.queue_id, clock_timestamp()
FROM queen.queue_buckets b JOIN queen.queues q ON q.queue_id = b.queue_id
WHERE q.ttl_enforced OR q.max_wait_time_seconds > 0 OR q.retention_enabled;

-- Have the next sweep look at a queue, if its messages may expire. Part of configure.
CREATE OR REPLACE FUNCTION queen.schedule_sweep(p_bucket integer, p_now timestamptz, p_queue_id uuid) RETURNS void
LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off
AS $$
BEGIN
    INSERT INTO queen.queue_sweeps AS w (bucket, queue_id, due_at)
    SELECT p_bucket, p_queue_id, p_now FROM queen.queues q
    WHERE q.queue_id = p_queue_id AND (q.ttl_enforced OR q.max_wait_time_seconds > 0 OR q.retention_enabled)
    ON CONFLICT ON CONSTRAINT queue_sweeps_pkey DO UPDATE SET due_at = excluded.due_at;
    IF NOT FOUND THEN
        DELETE FROM queen.queue_sweeps w WHERE w.bucket = p_bucket AND w.queue_id = p_queue_id;
    END IF;
END
$$;

-- The queues that have something for a sweep to do in a bucket, of at most p_limit that are due to be looked at: their oldest
-- partition is older than an option allows. They stay due, behind the others; a queue in which nothing is too old is due when
-- something may be: what is pushed to it from now on is younger than its oldest message, or than now.
CREATE OR REPLACE FUNCTION queen.due_queues(p_bucket integer, p_now timestamptz, p_limit integer) RETURNS SETOF uuid
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off
AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_sweep record;
    v_seconds integer;
    v_oldest timestamptz;
    v_due timestamptz;
BEGIN
    FOR v_sweep IN
        SELECT w.queue_id FROM queen.queue_sweeps w WHERE w.bucket = p_bucket AND w.due_at <= v_now
        ORDER BY w.due_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    LOOP
        SELECT least(
            CASE WHEN q.ttl_enforced AND q.ttl_seconds > 0 THEN q.ttl_seconds END,
            CASE WHEN q.max_wait_time_seconds > 0 THEN q.max_wait_time_seconds END,
            CASE WHEN q.retention_enabled AND q.retention_seconds > 0 THEN q.retention_seconds END,
            CASE WHEN q.retention_enabled AND q.completed_retention_seconds > 0 THEN q.completed_retention_seconds END)
        INTO v_seconds FROM queen.queues q WHERE q.queue_id = v_sweep.queue_id;
        IF v_seconds IS NULL THEN  -- gone, or its options say nothing after all
            DELETE FROM queen.queue_sweeps w WHERE w.bucket = p_bucket AND w.queue_id = v_sweep.queue_id;
            CONTINUE;
        END IF;
        v_oldest := NULL;
        SELECT p.oldest_at INTO v_oldest FROM queen.partitions p
        WHERE p.bucket = p_bucket AND p.queue_id = v_sweep.queue_id AND p.oldest_at IS NOT NULL
        ORDER BY p.oldest_at LIMIT 1;
        v_due := coalesce(v_oldest, v_now) + make_interval(secs => v_seconds);
        IF v_due < v_now THEN
            v_due := v_now;
            RETURN NEXT v_sweep.queue_id;
        END IF;
        UPDATE queen.queue_sweeps w SET due_at = v_due
        WHERE w.bucket = p_bucket AND w.queue_id = v_sweep.queue_id;
    END LOOP;
END
$$;

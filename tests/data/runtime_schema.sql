-- The tables of the runtime's database that traces are made of.
CREATE TABLE sessions (
    id serial PRIMARY KEY,
    task text NOT NULL,
    status text NOT NULL DEFAULT 'running',
    metadata jsonb,
    final_answer text,
    reward jsonb,
    reward_stats jsonb,
    reward_audit jsonb,
    student_learning text,
    teacher_learning text,
    review_status text NOT NULL DEFAULT 'pending',
    review_notes text,
    created_at timestamptz NOT NULL DEFAULT now(),
    completed_at timestamptz
);
CREATE TABLE plans (
    session_id integer PRIMARY KEY REFERENCES sessions ON DELETE CASCADE,
    plan jsonb NOT NULL
);
CREATE TABLE step_results (
    session_id integer REFERENCES sessions ON DELETE CASCADE,
    step_id integer,
    trace text,
    output text,
    evaluation jsonb,
    attempts integer,
    metadata jsonb,
    PRIMARY KEY (session_id, step_id)
);
CREATE TABLE step_attempts (
    session_id integer REFERENCES sessions ON DELETE CASCADE,
    step_id integer,
    attempt integer,
    evaluation jsonb,
    PRIMARY KEY (session_id, step_id, attempt)
);
CREATE TABLE guidance_notes (
    session_id integer REFERENCES sessions ON DELETE CASCADE,
    step_id integer,
    sequence integer,
    note text NOT NULL,
    PRIMARY KEY (session_id, step_id, sequence)
);
CREATE TABLE trajectory_events (
    id serial PRIMARY KEY,
    session_id integer REFERENCES sessions ON DELETE CASCADE,
    event jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE learning_registry (
    learning_key text PRIMARY KEY,
    student_learning text,
    teacher_learning text,
    metadata jsonb,
    updated_at timestamptz NOT NULL DEFAULT now()
);
